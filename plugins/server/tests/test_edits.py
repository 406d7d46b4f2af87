"""Penalties and biases are those of the protocol; grammars let through exactly what may come."""

from __future__ import annotations

import pytest
import tiny_model
import torch
from drivetrain_server.workers.edits import Both, Grammars, Penalties

from drivetrain.errors import ConfigError


def test_penalties_are_the_formula_of_the_protocol():
    scores = torch.randn(10)
    before = scores.clone()
    found = Penalties(0.5, 0.25, {7: -100.0})([3, 3, 5], scores)
    expected = before.clone()
    for token, count in ((3, 2), (5, 1)):
        expected[token] -= count * 0.25 + 0.5
    expected[7] -= 100
    assert torch.equal(scores, before)
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def words():
    return tiny_model.tokenizer()


def test_a_grammar_lets_through_what_may_come_and_the_end_only_at_the_end(words):
    guide = Grammars(words).maker("regex", "(yes|yeah|no)")()
    size = len(words)

    def allowed(text):
        scores = guide(words(text)["input_ids"], torch.zeros(size + 3))
        tokens = torch.isfinite(scores).nonzero().flatten().tolist()
        return {words.decode([token]) for token in tokens}

    assert allowed("") == {"y", "n"}
    assert allowed("ye") == {"s", "a"}
    assert allowed("yes") == {words.eos_token}
    assert allowed("n") == {"o"}, "tokens were taken back"
    assert guide.failed == ""
    guide(words("nx")["input_ids"], torch.zeros(size))
    assert guide.failed != ""


def test_each_result_has_a_state_of_its_own_and_edits_combine(words):
    make = Grammars(words).maker("schema", {"const": {"a": 1}})
    one, other = make(), make()
    bias = Penalties(0, 0, {words("{")["input_ids"][0]: -5.0})
    scores = torch.zeros(len(words))
    one(words("{")["input_ids"], scores)
    best = Both([bias, other])([], scores).argmax()
    assert words.decode([int(best)]) == "{"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "(["),
        ("schema", {"type": "nonsense"}),
        ("schema", {"type": "object", "properties": {"a": False}, "required": ["a"]}),
        ("schema", {"$ref": "#/nowhere"}),
        ("schema", {"allOf": [{"type": "string"}, {"type": "integer"}]}),
    ],
)
def test_what_no_text_can_meet_is_refused(words, kind, value):
    grammars = Grammars(words)
    with pytest.raises(ConfigError, match=kind):
        grammars.maker(kind, value)
