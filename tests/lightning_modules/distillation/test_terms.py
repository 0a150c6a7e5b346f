"""What is compared inside of student and teacher: hidden states and relations between tokens."""

import pytest
import torch

from lightning_modules.distillation import AttentionRelations, HiddenStates
from lightning_modules.distillation.attention import log_relations, relation_kl
from lightning_modules.distillation.hidden import normalised_error
from lightning_modules.distillation.watched import outputs_of, paired_blocks
from qat.errors import InputError
from tests.conftest import tiny_llama
from tests.models import tiny_gpt2

ALL = torch.ones(2, 7, dtype=torch.bool)


def test_the_error_of_hidden_states_is_relative():
    h = torch.randn(2, 7, 16)
    assert normalised_error(h, h, ALL) == 0
    torch.testing.assert_close(normalised_error(torch.zeros_like(h), h, ALL), torch.tensor(1.0))
    noise = 0.1 * torch.randn_like(h)
    norms = torch.full((2, 7, 1), 1.0)
    norms[0, 0] = 1000.0  # a massive activation weighs as much as any token
    torch.testing.assert_close(
        normalised_error(norms * (h + noise), norms * h, ALL), normalised_error(h + noise, h, ALL)
    )


def test_padding_does_not_count():
    own, theirs = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    counts = ALL.clone()
    counts[0, :3] = False
    before = normalised_error(own, theirs, counts), relation_kl(own, theirs, 4, counts)
    own[0, :3], theirs[0, :3] = 99.0, -99.0
    assert torch.equal(
        torch.stack(before), torch.stack([normalised_error(own, theirs, counts), relation_kl(own, theirs, 4, counts)])
    )


def test_relations_are_distributions_over_the_past():
    x = torch.randn(2, 7, 16)
    relations = log_relations(x, 4, ALL).exp()
    torch.testing.assert_close(relations.sum(-1), torch.ones(2, 4, 7))
    assert (relations.triu(1) == 0).all()
    later = x.clone()
    later[:, 4:] += 1.0
    assert torch.equal(log_relations(later, 4, ALL)[:, :, :4, :4], log_relations(x, 4, ALL)[:, :, :4, :4])
    part = x[0, :5, :4]
    expected = (part @ part.T / 2)[4].softmax(-1)
    torch.testing.assert_close(relations[0, 0, 4, :5], expected)


def test_relations_compare_models_of_other_widths_and_rotated_heads():
    """A relation is made of inner products: what turns every head leaves it as it was."""
    own, wider = torch.randn(2, 7, 16), torch.randn(2, 7, 32)
    assert relation_kl(own, wider, 4, ALL) > 0
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    turned = (own.unflatten(-1, (4, 4)) @ turn).flatten(-2)
    assert relation_kl(turned, own, 4, ALL).abs() < 1e-5
    assert relation_kl(own, own, 4, ALL) == 0


def test_relations_are_computed_in_float32_under_autocast():
    own, theirs = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    expected = relation_kl(own, theirs, 4, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relation_kl(own, theirs, 4, ALL), expected)


def test_blocks_are_paired_by_depth():
    deep, shallow = tiny_llama(num_hidden_layers=6), tiny_llama(num_hidden_layers=3)
    pairs = paired_blocks("x", None, shallow, deep)
    assert [list(deep.model.layers).index(theirs) for _, theirs in pairs] == [1, 3, 5]
    assert [list(shallow.model.layers).index(own) for own, _ in paired_blocks("x", [-1, 0], shallow, deep)] == [2, 0]


def test_outputs_are_seen_within_only():
    model = tiny_llama()
    block = model.model.layers[1]
    ids = torch.randint(0, 96, (1, 8))
    with outputs_of([block]) as found:
        hidden = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.model.norm(found[block]), hidden)
    assert not block._forward_hooks
    with pytest.raises(RuntimeError), outputs_of([block]):
        raise RuntimeError
    assert not block._forward_hooks


@pytest.mark.parametrize(
    ("term", "make_teacher", "message"),
    [
        (HiddenStates(1.0), lambda: tiny_llama(hidden_size=32), "64 features in the student and 32 in the teacher"),
        (HiddenStates(1.0, [2]), tiny_llama, r"distill.hidden.layers has 2, and the blocks are 0 to 1"),
        (HiddenStates(1.0, -1), tiny_llama, r"distill.hidden.layers is -1; it is a list"),
        (AttentionRelations(1.0, ["x"]), tiny_llama, r"distill.attention.layers has x"),
        (AttentionRelations(1.0, heads=3), tiny_llama, "heads is 3, which does not divide the 64 features"),
        (AttentionRelations(1.0), tiny_gpt2, "q_proj, k_proj, v_proj, which GPT2Block has not"),
    ],
    ids=["sizes", "no block", "no list", "no number", "heads", "projections"],
)
def test_terms_that_do_not_fit(term, make_teacher, message):
    with pytest.raises(InputError, match=message):
        term.pairs(tiny_llama(), make_teacher())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenStates(-1), "distill.hidden.weight is -1"),
        (lambda: AttentionRelations("x"), "distill.attention.weight is x"),
        (lambda: AttentionRelations(1.0, heads=0), "distill.attention.heads is 0"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_relation_heads_are_those_of_keys_and_values():
    term = AttentionRelations(1.0, [0, -1])
    assert len(term.pairs(tiny_llama(), tiny_llama())) == 6
    assert term.heads == 2
