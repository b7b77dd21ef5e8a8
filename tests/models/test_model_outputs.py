"""Losses, gradients, heads, and what a forward pass returns."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.model_families import FAMILIES, Family, checkpoint_activations, tokens
from tests.support.rounding import assert_near

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
over_sides = pytest.mark.parametrize("side", ["left", "right"])


@over_families
@torch.no_grad()
def test_logits_to_keep(family: Family) -> None:
    model = family.model()
    ids = tokens(2, 12)
    logits = model(ids).logits
    assert logits.shape == (2, 12, 320)
    assert_near(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert_near(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])


@over_families
def test_loss_is_next_token_cross_entropy(family: Family) -> None:
    model = family.model()
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[0, :6] = -100
    outputs = model(ids, labels=labels)
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert_near(outputs.loss, F.cross_entropy(logits, targets))
    total = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    assert_near(total, F.cross_entropy(logits, targets, reduction="sum") / 100)


@over_families
def test_loss_of_a_half_precision_model_is_float32(family: Family) -> None:
    ids = tokens(1, 8)
    outputs = family.model().bfloat16()(ids, labels=ids)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32


def gradients(model: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@over_families
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(family: Family, use_reentrant: bool) -> None:
    model = family.model("dynamic")
    ids = tokens(2, 40)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    plain = gradients(model, **batch)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    checkpoint_activations(model, {"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients(model, **batch)
    assert model.model.layers[0].gradient_checkpointing
    for name, gradient in plain.items():
        assert_near(checkpointed[name], gradient, name)


@over_families
def test_backends_have_the_same_gradients(family: Family) -> None:
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    labels = ids.clone()
    labels[0, :10] = -100  # also the first real token, which would be told from padding
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    eager, sdpa = (gradients(family.model(attn_implementation=name), **batch) for name in ("eager", "sdpa"))
    for name, gradient in eager.items():
        assert_near(sdpa[name], gradient, name)


@over_families
def test_autocast_trains_in_bfloat16(family: Family) -> None:
    model = family.model("dynamic", attn_implementation="sdpa")
    ids = tokens(1, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids)
        cached = model(ids[:, :20], use_cache=True)
    outputs.loss.backward()
    assert {layer.keys.dtype for layer in cached.past_key_values.layers} == {torch.bfloat16}
    torch.testing.assert_close(outputs.logits.float(), model(ids).logits, atol=0.25, rtol=0)


@over_families
def test_no_cache_is_kept_while_training_unless_asked_for(family: Family) -> None:
    model = family.model().train()
    ids = tokens(1, 8)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 8
    assert model.eval()(ids).past_key_values.get_seq_length() == 8
    assert model(ids, use_cache=False).past_key_values is None


@over_families
@torch.no_grad()
def test_hidden_states_attentions_and_tuples(family: Family) -> None:
    model = family.model()
    ids = tokens(2, 9)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 9, 64)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 9, 9)] * 3
    assert_near(torch.stack(outputs.attentions).sum(-1), torch.ones(3, 2, 4, 9))
    plain = model(ids, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple)
    assert_near(plain[0], outputs.logits)
    model.config.return_dict = False
    assert_near(model(ids, use_cache=False)[0], outputs.logits)
    assert isinstance(model.model(ids), tuple)


@over_families
def test_attention_weights_from_other_backends_are_refused(family: Family) -> None:
    model = family.model(attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"only attn_implementation=\"eager\" gives; this model runs 'sdpa'"):
        model(tokens(1, 4), output_attentions=True)


@over_families
def test_ids_and_embeddings_exclude_each_other(family: Family) -> None:
    model = family.model()
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


def classifier(family: Family, **overrides: Any) -> Any:
    model = family.cls("ForSequenceClassification")(family.config(num_labels=3, **overrides))
    model.load_state_dict(family.golden.state_dict("sequence_classification"))
    return model.eval()


@over_families
@over_sides
@pytest.mark.parametrize("told_by", ["mask", "pad ids"])
@torch.no_grad()
def test_classification_reads_the_last_real_token(family: Family, side: str, told_by: str) -> None:
    model = classifier(family)
    rows = [tokens(1, 5, seed=1), tokens(1, 9, seed=2)]
    rows[0][0, 2] = model.config.pad_token_id  # a pad id inside the text is text
    pads = [F.pad(row[0], (9 - row.shape[1], 0) if side == "left" else (0, 9 - row.shape[1])) for row in rows]
    ids = torch.stack(pads)
    widths = torch.tensor([[5], [9]])
    mask = torch.arange(9) >= 9 - widths if side == "left" else torch.arange(9) < widths
    if told_by == "mask":
        batch = model(ids, attention_mask=mask.long()).logits
    else:  # positions as the padding has them: the body itself does not know of it
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        last_states = sys.modules[type(model).__module__].last_states
        body = model.model(ids, attention_mask=mask.long(), position_ids=positions).last_hidden_state
        batch = model.score(last_states(model.config.pad_token_id, body, ids, None))
    alone = torch.cat([model(row).logits for row in rows])
    assert_near(batch, alone)


@over_families
@torch.no_grad()
def test_classification_without_a_pad_token_reads_the_last_token(family: Family) -> None:
    model = classifier(family)
    ids = tokens(2, 6)
    expected = model(ids).logits
    model.config.pad_token_id = None
    assert_near(model(ids).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert_near(model(inputs_embeds=embeds).logits, expected)


@over_families
@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])),
        ("regression", torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.0, 3.0]])),
    ],
)
def test_classification_losses(family: Family, problem: str, labels: torch.Tensor) -> None:
    outputs = classifier(family, problem_type=problem)(tokens(2, 6), labels=labels)
    losses = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }
    assert_near(outputs.loss, losses[problem](outputs.logits, labels))


@over_families
def test_tied_embeddings_are_one_parameter(family: Family) -> None:
    model = family.cls("ForCausalLM")(family.config(tie_word_embeddings=True))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.resize_token_embeddings(330)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model(tokens(1, 3)).logits.shape[-1] == 330
    untied = family.cls("ForCausalLM")(family.config())
    assert untied.get_input_embeddings().weight is not untied.get_output_embeddings().weight


@over_families
def test_fresh_weights(family: Family) -> None:
    model = family.cls("ForCausalLM")(family.config(initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name


@over_families
@torch.no_grad()
def test_norms_can_be_replaced_by_what_they_publish(family: Family) -> None:
    """InternEvo and others put their own norm in the place of every class called ...RMSNorm, from these two names."""
    model, ids = family.model(rms_norm_eps=1e-3), tokens(1, 8)
    expected = model(ids).logits

    def normed(self: Any, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) == 2 * model.config.num_hidden_layers + 1
    for norm in norms:
        norm.forward = types.MethodType(normed, norm)
    assert_near(model(ids).logits, expected)
