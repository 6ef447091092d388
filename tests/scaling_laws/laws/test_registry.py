"""What every law of the registry keeps: presets that predict, and derivatives that are finite."""

import jax
import numpy as np
import pytest

from benchmarks.scaling_laws import designs, planted
from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double

LAWS = laws.registry()
DESIGNS = designs.designs()
PRESETS = [(name, preset) for name, law in LAWS.items() for preset in law.presets]


def test_every_law_has_a_design_a_source_and_an_export():
    assert set(DESIGNS) == set(LAWS)
    exported = {id(getattr(laws, name)) for name in laws.__all__}
    for law in LAWS.values():
        assert "arXiv:" in law.source, law.name
        assert id(law) in exported, law.name


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_published_values_predict_something_sensible_and_say_where_they_are_from(name, preset):
    law = LAWS[name]
    published = law.presets[preset]
    assert "arXiv:" in published.source
    inputs = {k: v[:: max(1, len(v) // 7)] for k, v in DESIGNS[name].inputs.items()}
    values = np.asarray(in_double(law.predict)(published.values, inputs))
    assert np.isfinite(values).all()
    assert values[-1] > 0  # an error law is negative below the losses it was fitted to


@pytest.mark.parametrize("name", list(LAWS))
def test_derivatives_in_all_parameters_are_finite_for_every_run_of_a_design(name):
    design = DESIGNS[name]
    truth = {k: v[0, 0] for k, v in design.plant(1).items()}
    slopes = in_double(jax.jacfwd(lambda p: design.law.predict(p, dict(design.inputs))))(truth)
    for parameter, slope in slopes.items():
        assert np.isfinite(slope).all(), parameter
        assert np.any(np.asarray(slope) != 0), parameter


def test_planted_parameters_are_in_the_ranges_of_their_design():
    """Chinchilla's A is that of the term in the middle of the runs, where N is its mean in logs."""
    design = DESIGNS["chinchilla"]
    truth = design.plant(50)
    middle = np.exp(np.log(design.inputs["N"]).mean())
    term = truth["A"] * middle ** -truth["alpha"]
    assert term.min() >= 0.1
    assert term.max() <= 2.0
    assert planted.outputs(design, truth).shape == (50, 100)
