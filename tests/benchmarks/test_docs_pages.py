"""Generated pages: in step with the results and the registry, and honest about what is missing."""

import pytest

from benchmarks import docs_communication, docs_pages, markdown
from jaxopt_suite.optimizers import registry


def test_the_pages_in_docs_are_what_would_be_written_now():
    assert docs_pages.stale(docs_pages.DOCS) == [], "run: python -m benchmarks.docs_pages"


def test_an_edited_or_missing_page_is_noticed(tmp_path, capsys):
    words = ["--docs", str(tmp_path)]
    missing = docs_pages.stale(tmp_path)
    assert missing[: len(docs_pages.PAGES)] == list(docs_pages.PAGES)
    assert all(name.startswith("images/") for name in missing[len(docs_pages.PAGES) :])
    assert docs_pages.main(["--check", *words]) == 1
    assert not list(tmp_path.iterdir())
    assert docs_pages.main(words) == 0
    assert docs_pages.main(["--check", *words]) == 0
    page = tmp_path / "claims.md"
    page.write_text(page.read_text().replace("Claims", "Facts"))
    assert docs_pages.stale(tmp_path) == ["claims.md"]
    assert "claims.md" in capsys.readouterr().out


def test_without_measurements_the_pages_say_so(tmp_path):
    assert "No measurements yet." in docs_pages.fidelity(tmp_path)
    assert "No measurements yet." in docs_pages.claims(tmp_path)
    assert "No measurements yet." in docs_pages.laws(tmp_path)
    assert "No measurements yet." in docs_pages.bandwidth(tmp_path)
    assert "No measurements yet." in docs_pages.shampoo(tmp_path)


def test_every_recipe_is_on_the_optimizers_page_with_its_rate(tmp_path):
    page = docs_pages.optimizers(tmp_path)
    for name, recipe in registry().items():
        (line,) = (
            row for row in page.splitlines() if row.startswith(f"| `{name}` | {_whose(recipe)}")
        )
        assert f"| {recipe.learning_rate:g} |" in line


def _whose(recipe):
    return "peer" if recipe.peer else "ours"


def test_a_table_escapes_what_would_break_it():
    text = markdown.table(["a", "b"], [["x|y", "two\nlines"]])
    assert text == "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n"


@pytest.mark.parametrize("quick_first", [True, False])
def test_a_full_measurement_of_a_claim_is_shown_rather_than_a_quick_one(tmp_path, quick_first):
    row = {
        **dict.fromkeys(("name", "claim", "source", "how", "verdict"), "x"),
        **dict.fromkeys(("date", "our_commit", "hardware", "command"), "y"),
        "load": 0.0,
        "versions": {},
    }
    rows = [row | {"quick": True, "figure": "rough"}, row | {"quick": False, "figure": "sound"}]
    for item in rows if quick_first else rows[::-1]:
        docs_pages._results.append(tmp_path / "claims.json", item)
    page = docs_pages.claims(tmp_path)
    assert "sound" in page
    assert "rough" not in page


def test_measured_parts_are_filled_into_a_text_and_the_rest_stays():
    text = "a\n<!-- measured: x -->\nold\n<!-- end -->\nb\n<!-- measured: y -->\n<!-- end -->\n"
    filled = docs_communication.fill(text, {"x": "new", "y": "more"})
    assert filled == (
        "a\n<!-- measured: x -->\n\nnew\n\n<!-- end -->\nb\n"
        "<!-- measured: y -->\n\nmore\n\n<!-- end -->\n"
    )
    assert docs_communication.fill(filled, {"x": "new", "y": "more"}) == filled
    with pytest.raises(ValueError, match="'z'"):
        docs_communication.fill(text, {"z": ""})


def test_bytes_of_a_warm_up_are_dense_ones_and_the_rest_is_what_the_program_holds_besides():
    dense = {"name": "AdamW, dense", "wire_bytes": 100.0, "steps": 200}
    assert docs_communication.mean_bytes(dense, dense) == 100.0
    # 40 steps of 100 bytes, 160 of 5.
    row = {"name": "1-bit Adam", "wire_bytes": 105.0, "steps": 200}
    assert docs_communication.mean_bytes(row, dense) == pytest.approx(0.2 * 100 + 0.8 * 5)


def test_a_picture_says_what_it_was_drawn_from(tmp_path):
    path = tmp_path / "x.svg"
    assert not docs_communication.is_made_of(path, "12")
    figure, _ = docs_communication._axes("x", "y")
    path.write_text(docs_communication.document("12", figure))
    assert docs_communication.is_made_of(path, "12")
    assert not docs_communication.is_made_of(path, "34")
