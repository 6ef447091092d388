r"""What is counted as a parameter and as a FLOP: named rules, functions of a transformer's shape.

A fit is only comparable with another that counts alike: leaving the embeddings out of $N$ changes
the exponent of small models, where they are most of the parameters. So every table of runs carries
the names of its rules, and rules are never mixed.

Counts of FLOPs are of training, forward and backward, per token; one multiply-add is two. Norms,
biases and learned positions are left out everywhere. Sizes may be numbers or arrays of one shape.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["FLOP_RULES", "N_RULES", "FlopRule", "Shape", "SizeRule", "check_one_rule"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of decoder-only transformers; each a number or float64 ``[runs]``, None: not known.

    Attributes:
      width: features of the residual stream, $d$.
      depth: layers, $\\ell$.
      vocab: tokens in the vocabulary, $V$.
      seq_len: tokens of context, $s$.
      heads: attention heads, $H$.
      head_size: features per head, $k$; None: ``width / heads``.
      ff_width: width of the feed-forward layer, $f$.
      ff_matrices: matrices of the feed-forward layer: 2, or 3 if it is gated.
    """

    width: Any = None
    depth: Any = None
    vocab: Any = None
    seq_len: Any = None
    heads: Any = None
    head_size: Any = None
    ff_width: Any = None
    ff_matrices: Any = None

    @property
    def attention_width(self) -> Any:
        """Features of all heads together, $kH$; equal to ``width`` unless heads say otherwise."""
        return self.width if self.head_size is None else self.head_size * self.heads


Count = Callable[[Shape], Any]


@dataclasses.dataclass(frozen=True)
class SizeRule:
    """A way to count parameters.

    Attributes:
      name: what it is called in files and arguments.
      needs: sizes that must be known.
      count: parameters of a shape.
      source: who counts so.
    """

    name: str
    needs: tuple[str, ...]
    count: Count
    source: str

    def of(self, shape: Shape) -> Any:
        """Parameters of ``shape``.

        Raises:
          ValueError: if a size that the rule needs is not known.
        """
        _require(self.name, self.needs, shape)
        return self.count(shape)


@dataclasses.dataclass(frozen=True)
class FlopRule:
    """A way to count the FLOPs of training.

    Attributes:
      name: what it is called in files and arguments.
      needs: sizes that must be known; none for ``"6ND"``, which needs ``N``.
      per_token: FLOPs per token of a shape; None for ``"6ND"``.
      source: who counts so.
    """

    name: str
    needs: tuple[str, ...]
    per_token: Count | None
    source: str

    def of(self, shape: Shape, *, n: Any = None) -> Any:
        """FLOPs per token.

        Args:
          shape: of the models.
          n: their parameters, by the rule under which they are stored; only ``"6ND"`` reads it.

        Raises:
          ValueError: if a size that the rule needs is not known.
        """
        if self.per_token is None:
            if n is None:
                raise ValueError(f"the FLOP rule {self.name!r} needs N")
            return 6.0 * np.asarray(n, np.float64)
        _require(self.name, self.needs, shape)
        return self.per_token(shape)


def _require(name: str, needs: tuple[str, ...], shape: Shape) -> None:
    missing = [size for size in needs if getattr(shape, size) is None]
    if missing:
        raise ValueError(
            f"the rule {name!r} needs {', '.join(missing)}, which the runs do not have"
        )


def _body(shape: Shape) -> Any:
    """Attention and feed-forward matrices: $\\ell (4 d k H + m d f)$."""
    attention = 4.0 * shape.width * shape.attention_width
    return shape.depth * (attention + shape.ff_matrices * shape.width * shape.ff_width)


def _body_head(shape: Shape) -> Any:
    """The body and one table of $V d$, the output head."""
    return _body(shape) + 1.0 * shape.vocab * shape.width


def _total(shape: Shape) -> Any:
    """The body and two tables of $V d$, embedding and output head, not tied."""
    return _body(shape) + 2.0 * shape.vocab * shape.width


def _body_head_attention(shape: Shape) -> Any:
    """$6 (N_{body} + V d) + 6 s d \\ell$: half of the attention's square, as it is causal."""
    return 6 * _body_head(shape) + 6.0 * shape.seq_len * shape.width * shape.depth


def _steplaw_m(shape: Shape) -> Any:
    """$6 \\ell d (4 d + 3 f + 2 s)$."""
    return (
        6.0 * shape.depth * shape.width * (4 * shape.width + 3 * shape.ff_width + 2 * shape.seq_len)
    )


def _deepseek_m(shape: Shape) -> Any:
    """$72 \\ell d^2 + 12 \\ell d s$."""
    return 72.0 * shape.depth * shape.width**2 + 12.0 * shape.depth * shape.width * shape.seq_len


def _full_sum(shape: Shape) -> Any:
    """Every operation of the forward pass, a token's share of it, times three.

    Embedding $2 V d$; in each layer projections $2 \\cdot 3 d k H$, logits $2 s k H$, softmax
    $3 H s$, weighted values $2 s k H$, output $2 k H d$, feed-forward $2 m d f$; head $2 d V$.
    """
    d, s, wide = 1.0 * shape.width, shape.seq_len, shape.attention_width
    attention = 6 * d * wide + 2 * s * wide + 3 * shape.heads * s + 2 * s * wide + 2 * wide * d
    layer = attention + 2 * shape.ff_matrices * d * shape.ff_width
    return 3 * (4 * d * shape.vocab + shape.depth * layer)


_BLOCK = ("width", "depth", "ff_width", "ff_matrices")
_TABLES = (*_BLOCK, "vocab")

N_RULES: Mapping[str, SizeRule] = types.MappingProxyType(
    {
        rule.name: rule
        for rule in (
            SizeRule("body", _BLOCK, _body, "Kaplan et al., 2020, arXiv:2001.08361"),
            SizeRule("body_head", _TABLES, _body_head, "Porian et al., 2024, arXiv:2406.19146"),
            SizeRule("total", _TABLES, _total, "Hoffmann et al., 2022, arXiv:2203.15556"),
        )
    }
)


def _six_times(rule: SizeRule) -> FlopRule:
    return FlopRule(rule.name, rule.needs, lambda shape: 6 * rule.count(shape), rule.source)


FLOP_RULES: Mapping[str, FlopRule] = types.MappingProxyType(
    {
        rule.name: rule
        for rule in (
            FlopRule("6ND", (), None, "Kaplan et al., 2020, arXiv:2001.08361"),
            *map(_six_times, N_RULES.values()),
            FlopRule(
                "body_head_attention",
                (*_TABLES, "seq_len"),
                _body_head_attention,
                "Porian et al., 2024, arXiv:2406.19146",
            ),
            FlopRule(
                "steplaw_m",
                ("width", "depth", "ff_width", "seq_len"),
                _steplaw_m,
                "Li et al., 2025, arXiv:2503.04715",
            ),
            FlopRule(
                "deepseek_m",
                ("width", "depth", "seq_len"),
                _deepseek_m,
                "DeepSeek-AI, 2024, arXiv:2401.02954",
            ),
            FlopRule(
                "full_sum",
                (*_TABLES, "seq_len", "heads"),
                _full_sum,
                "Hoffmann et al., 2022, arXiv:2203.15556, appendix F",
            ),
        )
    }
)


def check_one_rule(name: str, found: Mapping[str | None, str]) -> str | None:
    """The one convention that all rows share.

    Args:
      name: of the convention, for the message: ``"n_rule"``, ``"flop_rule"`` or ``"loss_kind"``.
      found: each value that occurs and where, such as ``{"body": "a.csv:2"}``; None: not stated.

    Raises:
      ValueError: if there is more than one.
    """
    if len(found) > 1:
        listed = "; ".join(f"{value or 'not stated'} at {where}" for value, where in found.items())
        raise ValueError(
            f"{name} must be the same for all runs, as numbers counted in different ways do not "
            f"fit together; got {listed}. Load them separately, or leave some out beforehand"
        )
    return next(iter(found), None)
