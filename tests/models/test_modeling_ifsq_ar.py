import cmath
import inspect
import math
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, DynamicCache, Trainer, TrainingArguments
from transformers.quantizers.base import get_keys_to_not_convert

from hf_ifsq import IFSQARConfig, IFSQARForImageGeneration, IFSQARModel
from hf_ifsq.models import layers_ifsq_ar
from hf_ifsq.models.layers_ifsq_ar import linear_cross_entropy


FACTORS = {1: [12], 2: [4, 3], 3: [3, 5, 2], 4: [2, 3, 2, 4]}
every_factorization = pytest.mark.parametrize(
    "vocab_sizes", FACTORS.values(), ids=lambda sizes: f"{len(sizes)}-factor"
)


def random_inputs(model, batch=2):
    indices = torch.randint(model.config.codebook_size, (batch, model.config.num_tokens))
    return torch.arange(batch) % model.config.num_classes, indices


def logits_of(model, class_labels, input_ids, **kwargs):
    """Logits of each factor."""
    return model(class_labels, input_ids, **kwargs).logits.split(model.config.vocab_sizes, dim=-1)


def split(index, vocab_sizes):
    digits = []
    for size in vocab_sizes:
        index, digit = divmod(index, size)
        digits.append(digit)
    return digits


class Reference:
    """LlamaGen for one image, one position at a time, in float64 and complex numbers."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
        self.num_factors = len(model.config.vocab_sizes)

    def norm(self, states, name):
        mean_square = states.square().mean(-1, keepdim=True)
        return states / torch.sqrt(mean_square + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def rotate(self, vector, position):
        if position == 0:
            return torch.zeros_like(vector)
        row, column = divmod(position - 1, self.config.grid_size[1])
        pairs = len(vector) // 2
        turned = []
        for pair in range(pairs):
            step, place = (pair, row) if pair < pairs // 2 else (pair - pairs // 2, column)
            angle = place / self.config.rope_theta ** (2 * step / pairs)
            value = complex(vector[2 * pair], vector[2 * pair + 1]) * cmath.exp(1j * angle)
            turned += [value.real, value.imag]
        return torch.tensor(turned, dtype=torch.float64)

    def layer(self, states, name):
        heads = self.config.num_attention_heads
        qkv = self.norm(states, f"{name}.input_layernorm") @ self.weights[f"{name}.self_attn.qkv_proj.weight"].T
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, dim=-1))
        attended = torch.zeros_like(value)
        for head in range(heads):
            queries = [self.rotate(vector, position) for position, vector in enumerate(query[:, head])]
            keys = [self.rotate(vector, position) for position, vector in enumerate(key[:, head])]
            for position in range(len(states)):
                seen = torch.stack(keys[: position + 1])
                weights = torch.softmax(seen @ queries[position] / math.sqrt(seen.shape[1]), dim=0)
                attended[position, head] = weights @ value[: position + 1, head]
        states = states + attended.flatten(1) @ self.weights[f"{name}.self_attn.o_proj.weight"].T
        gate_up = (
            self.norm(states, f"{name}.post_attention_layernorm") @ self.weights[f"{name}.mlp.gate_up_proj.weight"].T
        )
        gate, up = gate_up.chunk(2, dim=-1)
        return states + (gate * torch.sigmoid(gate) * up) @ self.weights[f"{name}.mlp.down_proj.weight"].T

    def embed(self, factor, digit):
        return self.weights[f"model.embed_tokens.{factor}.weight"][digit]

    def logits(self, class_label, indices):
        """A list of logits `(num_tokens, vocab_size)`, one a factor."""
        digits = [split(index, self.config.vocab_sizes) for index in indices]
        states = [self.weights["model.embed_classes.weight"][class_label]]
        states += [sum(self.embed(factor, digit) for factor, digit in enumerate(token)) for token in digits[:-1]]
        states = torch.stack(states)
        for idx in range(self.config.num_hidden_layers):
            states = self.layer(states, f"model.layers.{idx}")
        outputs = []
        for state, token in zip(states, digits, strict=True):
            sequence = torch.stack(
                [state, *(self.embed(factor, token[factor]) for factor in range(self.num_factors - 1))]
            )
            for idx in range(self.config.num_factor_layers if self.num_factors > 1 else 0):
                sequence = self.layer(sequence, f"factor_layers.{idx}")
            outputs.append(self.norm(sequence, "norm"))
        return [
            torch.stack([output[factor] for output in outputs]) @ self.weights[f"lm_heads.{factor}.weight"].T
            for factor in range(self.num_factors)
        ]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@every_factorization
def test_logits_equal_a_plain_reimplementation(make_ar, vocab_sizes, attn_implementation):
    model = make_ar(vocab_sizes=vocab_sizes, rope_theta=50.0)
    model.set_attn_implementation(attn_implementation)
    class_labels, indices = random_inputs(model)
    logits = logits_of(model, class_labels, indices)
    for row in range(2):
        for ours, reference in zip(
            logits, Reference(model).logits(class_labels[row], indices[row].tolist()), strict=True
        ):
            torch.testing.assert_close(ours[row].double(), reference, atol=2e-5, rtol=0)
            assert reference.std() > 0.3


# Parameters in millions, as LlamaGen publishes them for a vocabulary of 16384.
@pytest.mark.parametrize(
    "millions, hidden_size, num_hidden_layers, num_attention_heads",
    [(111, 768, 12, 12), (343, 1024, 24, 16), (775, 1280, 36, 20), (1411, 1536, 48, 24), (3097, 3200, 24, 32)],
)
def test_sizes_of_llamagen(millions, hidden_size, num_hidden_layers, num_attention_heads):
    config = IFSQARConfig(
        vocab_sizes=[16384],
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
    )
    with torch.device("meta"):
        model = IFSQARForImageGeneration(config)
    assert round(model.num_parameters() / 1e6) == millions


@pytest.mark.parametrize("class_dropout_prob, rows", [(0.1, 6), (0.0, 5)])
@every_factorization
def test_parameter_count(make_ar, vocab_sizes, class_dropout_prob, rows):
    model = make_ar(vocab_sizes=vocab_sizes, num_factor_layers=3, class_dropout_prob=class_dropout_prob)
    width, inner = 32, 48
    layers = 2 + (3 if len(vocab_sizes) > 1 else 0)
    expected = rows * width + 2 * sum(vocab_sizes) * width + width
    expected += layers * (4 * width**2 + 3 * width * inner + 2 * width)
    assert model.num_parameters() == expected


@every_factorization
def test_fresh_model_predicts_uniformly(vocab_sizes):
    config = IFSQARConfig(
        vocab_sizes=vocab_sizes, grid_size=[4, 4], hidden_size=64, num_attention_heads=4, dropout=0.5
    )
    model = IFSQARForImageGeneration(config)
    class_labels, indices = random_inputs(model)
    output = model(class_labels, indices, labels=indices)
    assert [loss.item() for loss in output.factor_losses] == pytest.approx([math.log(size) for size in vocab_sizes])
    for name, weight in model.model.named_parameters():
        if weight.ndim == 2 and "norm" not in name:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name


@every_factorization
def test_causality(make_ar, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes)
    class_labels, indices = random_inputs(model, batch=1)
    before = logits_of(model, class_labels, indices)
    for factor, size in enumerate(vocab_sizes):
        for changed in (0, 5, 11):
            # Replace one factor of one token by the next value.
            radix = math.prod(vocab_sizes[:factor])
            digit = indices[0, changed].item() // radix % size
            other = indices.clone()
            other[0, changed] += ((digit + 1) % size - digit) * radix
            after = logits_of(model, class_labels, other)
            for head, (old, new) in enumerate(zip(before, after, strict=True)):
                moved = (old - new).abs().amax(-1)[0] > 1e-4
                # Later tokens move, and at the same position the factors that follow.
                first_moved = changed if head > factor else changed + 1
                assert moved.tolist() == [position >= first_moved for position in range(12)]
    for old, new in zip(before, logits_of(model, class_labels + 1, indices), strict=True):
        assert ((old - new).abs().amax(-1) > 1e-4).all()


def test_position_of_the_class_has_no_query_and_no_key(make_ar):
    model = make_ar()
    class_labels, indices = random_inputs(model)
    cache = model(class_labels, indices, use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 4, 12, 8)
        assert torch.equal(layer.keys[:, :, 0], torch.zeros(2, 4, 8))
        assert (layer.keys[:, :, 1:].abs().amax(-1) > 0).all() and (layer.values.abs().amax(-1) > 0).all()


@every_factorization
def test_splitting_and_joining_indices(make_ar, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes).model
    size = math.prod(vocab_sizes)
    indices = torch.arange(size).view(2, -1)
    factors = model.split_indices(indices)
    expected = [split(index, vocab_sizes) for index in range(size)]
    assert torch.stack([factor.flatten() for factor in factors], dim=1).tolist() == expected
    assert torch.equal(model.join_factors(factors), indices)


@every_factorization
def test_loss(make_ar, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes)
    class_labels, indices = random_inputs(model)
    labels = indices.clone()
    labels[0, 3:7] = -100
    labels[1, 11] = -100
    output = model(class_labels, indices, labels=labels)
    logits = output.logits.split(vocab_sizes, dim=-1)
    assert output.to_tuple()[:2] == (output.loss, output.logits)
    expected = [0.0] * len(vocab_sizes)
    kept = [(row, place) for row in range(2) for place in range(12) if labels[row, place] != -100]
    for row, place in kept:
        for factor, digit in enumerate(split(labels[row, place].item(), vocab_sizes)):
            scores = logits[factor][row, place].tolist()
            expected[factor] += (math.log(sum(map(math.exp, scores))) - scores[digit]) / len(kept)
    assert [loss.item() for loss in output.factor_losses] == pytest.approx(expected, rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(expected), rel=1e-5)
    assert model(class_labels, indices).loss is None


@pytest.mark.parametrize("train", [False, True])
@every_factorization
def test_hidden_states(make_ar, vocab_sizes, train):
    model = make_ar(vocab_sizes=vocab_sizes, class_dropout_prob=0.0).train(train)
    if train:
        model.activation_checkpointing_enable()
    class_labels, indices = random_inputs(model)
    output = model(class_labels, indices, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert model(class_labels, indices).hidden_states is None
    embeddings, _, last = output.hidden_states
    # Position 0 is the class and predicts token 0; position i reads token i - 1 and predicts token i.
    torch.testing.assert_close(embeddings[:, 0], model.model.embed_classes.weight[class_labels])
    for place in (1, 4, 11):
        digits = [split(index, vocab_sizes) for index in indices[:, place - 1].tolist()]
        tables = [table.weight for table in model.model.embed_tokens]
        expected = [sum(table[digit] for table, digit in zip(tables, token, strict=True)) for token in digits]
        torch.testing.assert_close(embeddings[:, place], torch.stack(expected))
    if len(vocab_sizes) == 1:
        torch.testing.assert_close(model.lm_heads[0](model.norm(last)), output.logits)
    # The base model returns the same residual stream.
    torch.testing.assert_close(model.model(class_labels, indices[:, :-1]).last_hidden_state, last)


def test_class_dropout(make_ar):
    model = make_ar(class_dropout_prob=0.25)
    class_labels, indices = torch.arange(4000) % 5, torch.zeros(4000, 1, dtype=torch.long)

    def share_of_null_class():
        embedded = model(class_labels, indices, output_hidden_states=True).hidden_states[0][:, 0]
        null = (embedded == model.model.embed_classes.weight[5]).all(-1)
        assert torch.equal(embedded[~null], model.model.embed_classes(class_labels[~null]))
        return null.float().mean().item()

    assert share_of_null_class() == 0
    model.train()
    # Five standard deviations of the share are 0.034.
    assert share_of_null_class() == pytest.approx(0.25, abs=0.035)


def test_dropout_acts_in_training_only(make_ar):
    model = make_ar(dropout=0.5, class_dropout_prob=0.0)
    class_labels, indices = random_inputs(model)
    assert torch.equal(model(class_labels, indices).logits, model(class_labels, indices).logits)
    model.train()
    embeddings = model(class_labels, indices, output_hidden_states=True).hidden_states[0]
    assert (embeddings == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(model(class_labels, indices).logits, model(class_labels, indices).logits)


@pytest.mark.parametrize("silenced", ["self_attn.o_proj", "mlp.down_proj"])
def test_dropout_of_each_residual_branch(make_ar, silenced):
    layer = make_ar(dropout=0.25, class_dropout_prob=0.0).model.layers[0]
    # Only one of the two branches is left.
    torch.nn.init.zeros_(layer.get_submodule(silenced).weight)
    states, table = torch.zeros(1, 1, 32) + torch.randn(32), (torch.ones(1, 8), torch.zeros(1, 8))
    branch = layer(states, table) - states
    dropped = torch.stack([layer.train()(states, table) - states for _ in range(200)])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, branch / 0.75), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("vocab_sizes", [FACTORS[1], FACTORS[2], FACTORS[4]], ids=["1", "2", "4"])
def test_cached_decoding_equals_teacher_forcing(make_ar, vocab_sizes, cache, step, attn_implementation):
    model = make_ar(vocab_sizes=vocab_sizes)
    model.set_attn_implementation(attn_implementation)
    class_labels, indices = random_inputs(model)
    past = DynamicCache(config=model.config) if cache == "dynamic" else None
    output = model(class_labels, indices[:, :1], past_key_values=past, use_cache=True)
    parts = [output.logits.split(vocab_sizes, dim=-1)]
    for i in range(1, 12, step):
        past = output.past_key_values
        assert past.get_seq_length() == i
        parts.append(logits_of(model, None, indices[:, i - 1 : i + step], past_key_values=past))
    for cached, whole in zip(zip(*parts, strict=True), logits_of(model, class_labels, indices), strict=True):
        torch.testing.assert_close(torch.cat(cached, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_prefix_of_an_image_and_eager_attention_give_the_same_logits(make_ar):
    model = make_ar(vocab_sizes=[4, 3])
    class_labels, indices = random_inputs(model)
    whole = logits_of(model, class_labels, indices)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    for length in (1, 7, 12):
        for prefix, full in zip(logits_of(model, class_labels, indices[:, :length]), whole, strict=True):
            torch.testing.assert_close(prefix, full[:, :length], atol=1e-5, rtol=0)


def test_cache_is_made_on_request_only(make_ar):
    model = make_ar()
    class_labels, indices = random_inputs(model)
    assert model(class_labels, indices).past_key_values is None
    model.config.use_cache = True
    assert model(class_labels, indices).past_key_values.get_seq_length() == 12
    assert model(class_labels, indices, use_cache=False).past_key_values is None


@pytest.mark.parametrize("vocab_sizes", [FACTORS[1], FACTORS[2]], ids=["1", "2"])
def test_gradient_checkpointing(make_ar, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes, class_dropout_prob=0.0).train()
    class_labels, indices = random_inputs(model)
    layers, calls, gradients = [*model.model.layers, *model.factor_layers], [], []
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    for prepare in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        prepare()
        model.zero_grad()
        model(class_labels, indices, labels=indices).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # Once without checkpointing; with it, once forward and once again backward.
    assert len(calls) == 3 * len(layers)
    plain, checkpointed = gradients
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-6, rtol=1e-5)
        assert plain[name].abs().max() > 0, name


@pytest.mark.parametrize("vocab_sizes", [FACTORS[1], FACTORS[2]], ids=["1", "2"])
def test_save_and_load(make_ar, tmp_path, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes, id2label={i: f"class {i}" for i in range(5)}, rope_theta=77.0)
    model.save_pretrained(tmp_path)
    class_labels, indices = random_inputs(model)
    loaded, info = IFSQARForImageGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    expected = logits_of(model, class_labels, indices)
    assert all(torch.equal(*pair) for pair in zip(logits_of(loaded, class_labels, indices), expected, strict=True))
    assert loaded.config.id2label == {i: f"class {i}" for i in range(5)}
    assert (loaded.config.rope_theta, loaded.config.vocab_sizes, loaded.config.grid_size) == (
        77.0,
        vocab_sizes,
        [3, 4],
    )
    assert set(load_file(tmp_path / "model.safetensors")) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("model_class", [IFSQARForImageGeneration, IFSQARModel])
def test_checkpoint_that_does_not_fit(make_ar, tmp_path, spoil_checkpoint, model_class):
    model = make_ar(vocab_sizes=[4, 3])
    (model if model_class is IFSQARForImageGeneration else model.model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(spoil_checkpoint(tmp_path))):
        model_class.from_pretrained(tmp_path)


def test_auto_classes(make_ar, tmp_path):
    model = make_ar(vocab_sizes=[4, 3])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is IFSQARConfig and config.vocab_sizes == [4, 3]
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is IFSQARModel
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.model.parameters(), strict=True))


@pytest.mark.parametrize("vocab_sizes", [FACTORS[1], FACTORS[2]], ids=["1", "2"])
def test_bfloat16(make_ar, tmp_path, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes)
    class_labels, indices = random_inputs(model)
    expected = logits_of(model, class_labels, indices)
    table = model.model.rotary_table(torch.device("cpu"))
    model.save_pretrained(tmp_path)
    cast = IFSQARForImageGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(cast.model.rotary_table(torch.device("cpu")), table, strict=True))
    assert table[0].dtype == torch.float32
    for low, full in zip(logits_of(cast, class_labels, indices), expected, strict=True):
        assert low.dtype == torch.bfloat16
        assert (low.float() - full).abs().mean() < 0.02 * full.std()
    assert cast(class_labels, indices, labels=indices).loss.dtype == torch.float32


@pytest.mark.parametrize("hidden_size, width", [(64, 256), (768, 2048), (1024, 2816), (3200, 8704)])
def test_default_width_of_the_feed_forward_layers(hidden_size, width):
    assert IFSQARConfig(hidden_size=hidden_size, num_attention_heads=4).intermediate_size == width


@pytest.mark.parametrize(
    "name, value, others",
    [
        ("vocab_sizes", [], {}),
        ("vocab_sizes", [9, 1], {}),
        ("grid_size", [4], {}),
        ("grid_size", [4, 0], {}),
        ("hidden_size", 40, {"num_attention_heads": 4}),
        ("dropout", 1.0, {}),
        ("dropout", -0.1, {}),
        ("class_dropout_prob", 1.5, {}),
    ],
)
def test_config_refuses(name, value, others):
    with pytest.raises(StrictDataclassClassValidationError, match=f"`{name}`.*{re.escape(str(value))}"):
        IFSQARConfig(**{name: value, **others})


def test_config_refuses_names_for_another_number_of_classes():
    with pytest.raises(
        StrictDataclassClassValidationError, match="`id2label` names 2 classes, but `num_classes` is 3"
    ):
        IFSQARConfig(num_classes=3, id2label={0: "cat", 1: "dog"})


def test_config_refuses_more_factors_than_rotary_positions():
    with pytest.raises(StrictDataclassClassValidationError, match=r"`vocab_sizes` has 4 factors.*\[1, 2\].*only 3"):
        IFSQARConfig(vocab_sizes=[2, 2, 2, 2], grid_size=[1, 2])


@pytest.mark.parametrize("class_dropout_prob, last", [(0.1, 5), (0.0, 4)])
def test_class_labels_out_of_range(make_ar, class_dropout_prob, last):
    model = make_ar(class_dropout_prob=class_dropout_prob)
    indices = torch.zeros(2, 12, dtype=torch.long)
    assert torch.isfinite(model(torch.tensor([0, last]), indices).logits).all()
    for labels in ([0, last + 1], [-1, 0]):
        # `forward` reads no value; `generate` says what is wrong.
        with pytest.raises(IndexError, match="out of range"):
            model(torch.tensor(labels), indices)
        with pytest.raises(ValueError, match=rf"`class_labels`.*\[0, {last}\].*{re.escape(str(labels))}"):
            model.generate(torch.tensor(labels))


@pytest.mark.parametrize(
    "class_labels, got",
    [
        (torch.zeros(2), r"float32.*\(2,\)"),
        (torch.zeros(2, 1, dtype=torch.long), r"int64.*\(2, 1\)"),
        # One label for two images.
        (torch.zeros(1, dtype=torch.long), r"\(1,\)"),
        (torch.zeros(3, dtype=torch.long), r"\(3,\)"),
    ],
    ids=["float", "two dimensions", "too few", "too many"],
)
def test_wrong_class_labels(make_ar, class_labels, got):
    with pytest.raises(ValueError, match=f"`class_labels`.*{got}"):
        make_ar()(class_labels, torch.zeros(2, 12, dtype=torch.long))


def test_class_labels_are_needed_without_a_cache(make_ar):
    with pytest.raises(ValueError, match="`class_labels` must be given"):
        make_ar()(None, torch.zeros(2, 12, dtype=torch.long))


def test_base_model_needs_some_input(make_ar):
    with pytest.raises(ValueError, match="`class_labels`, `input_ids` or both"):
        make_ar().model()


@pytest.mark.parametrize("shape", [(2,), (2, 0), (2, 13), (2, 3, 4)])
def test_wrong_shape_of_input_ids(make_ar, shape):
    with pytest.raises(ValueError, match=f"`input_ids`.*1 to 12.*got {re.escape(str(shape))}"):
        make_ar()(torch.zeros(2, dtype=torch.long), torch.zeros(shape, dtype=torch.long))


def test_missing_input_ids(make_ar):
    with pytest.raises(ValueError, match="`input_ids`.*got None"):
        make_ar()(torch.zeros(2, dtype=torch.long))


def test_input_ids_must_be_integers(make_ar):
    with pytest.raises(ValueError, match="`input_ids`.*float32"):
        make_ar()(torch.zeros(2, dtype=torch.long), torch.zeros(2, 12))


def test_one_token_after_the_cache_leaves_nothing_to_predict(make_ar):
    model = make_ar()
    class_labels, indices = random_inputs(model)
    past = model(class_labels, indices[:, :1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"`input_ids`.*got \(2, 1\)"):
        model(None, indices[:, :1], past_key_values=past)


def test_wrong_shape_of_labels(make_ar):
    class_labels, indices = random_inputs(model := make_ar())
    with pytest.raises(ValueError, match=r"`labels`.*\(2, 12\), got \(2, 11\)"):
        model(class_labels, indices, labels=indices[:, 1:])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name, wrong", [("input_ids", -1), ("input_ids", 12), ("labels", 12), ("labels", -99)])
@pytest.mark.parametrize("vocab_sizes", [FACTORS[1], FACTORS[2]], ids=["1", "2"])
def test_tokens_outside_the_codebook_are_never_taken_for_others(make_ar, vocab_sizes, name, wrong, train):
    model = make_ar(vocab_sizes=vocab_sizes).train(train)
    class_labels, indices = random_inputs(model)
    inputs = {"input_ids": indices, "labels": indices.clone()}
    inputs[name] = indices.clone()
    inputs[name][1, 10 if name == "input_ids" else 11] = wrong
    # On a GPU the kernels assert it.
    with pytest.raises(IndexError, match="out of (range|bounds)"):
        model(class_labels, **inputs)


# Published by LlamaGen for 16,384 tokens and 1,000 classes, in millions.
@pytest.mark.parametrize("size, millions", [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)])
def test_named_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = IFSQARForImageGeneration(IFSQARConfig.from_size(size, vocab_sizes=[16384]))
    assert round(model.num_parameters() / 1e6) == millions


def test_arguments_override_a_named_size():
    config = IFSQARConfig.from_size("S", num_hidden_layers=2, num_classes=7)
    assert (config.num_hidden_layers, config.hidden_size, config.num_classes) == (2, 384, 7)
    with pytest.raises(ValueError, match="`size` must be one of.*got 'M'"):
        IFSQARConfig.from_size("M")


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("rows", [3, 7, 100])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_linear_cross_entropy_equals_that_of_all_scores(monkeypatch, rows, bfloat16):
    monkeypatch.setattr(layers_ifsq_ar, "MAX_SCORES", 50 * rows)
    states, head = torch.randn(20, 6, requires_grad=True), torch.nn.Linear(6, 50, bias=False)
    targets = torch.randint(50, (20,))
    targets[[2, 11]] = -100

    def run(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = function()
        return loss, torch.autograd.grad(loss, (states, head.weight))

    loss, gradients = run(lambda: linear_cross_entropy(head, states, targets))
    expected, expected_gradients = run(lambda: F.cross_entropy(head(states).float(), targets))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    tolerance = {"rtol": 0, "atol": 2e-3} if bfloat16 else {}
    torch.testing.assert_close(gradients, expected_gradients, **tolerance)


@pytest.mark.parametrize("vocab_sizes", [[3000], [3000, 2500]])
def test_training_never_holds_all_scores(make_ar, monkeypatch, vocab_sizes):
    model, class_labels = make_ar(vocab_sizes=vocab_sizes), torch.arange(5).repeat(10)
    indices = torch.randint(model.config.codebook_size, (50, 12))
    expected = model(class_labels, indices, labels=indices)
    # Fewer than the weights of a head.
    monkeypatch.setattr(layers_ifsq_ar, "MAX_SCORES", 64 * 3000)
    model.config.class_dropout_prob = 0.0
    with LargestTensor() as largest:
        output = model.train()(class_labels, indices, labels=indices)
        output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.factor_losses, expected.factor_losses)
    assert largest.elements <= 64 * 3000 < 600 * 2500


def test_cache_that_has_no_room(make_ar):
    model, ids = make_ar(), torch.zeros(1, 12, dtype=torch.long)
    cache = model(torch.tensor([1]), ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`input_ids` has 12 tokens, but after the 5 positions.*sequence of 12"):
        model(None, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="`class_labels` must be left out"):
        model(torch.tensor([1]), ids[:, :2], past_key_values=cache)
    assert model(None, ids[:, :8], past_key_values=cache).logits.shape == (1, 7, 9)


def test_several_factors_need_factor_layers():
    with pytest.raises(StrictDataclassClassValidationError, match="`num_factor_layers` must be at least 1"):
        IFSQARConfig(vocab_sizes=[3, 4], num_factor_layers=0)
    assert IFSQARConfig(vocab_sizes=[12], num_factor_layers=0).num_factor_layers == 0


def test_grid_size_may_be_the_side_of_a_square(make_ar, tmp_path):
    model = make_ar(grid_size=3)
    assert model.config.grid_size == [3, 3] and model.config.num_tokens == 9
    class_labels, indices = random_inputs(model)
    square = make_ar(grid_size=(3, 3))
    square.load_state_dict(model.state_dict())
    assert torch.equal(square(class_labels, indices).logits, model(class_labels, indices).logits)
    model.save_pretrained(tmp_path)
    assert IFSQARForImageGeneration.from_pretrained(tmp_path).config.grid_size == [3, 3]
    assert IFSQARConfig.from_pretrained(tmp_path, grid_size=2).num_tokens == 4


@pytest.mark.parametrize("vocab_sizes", [[12], [4, 3]], ids=["1", "2"])
def test_what_a_trainer_takes_for_predictions_and_labels(make_ar, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes)
    class_labels, indices = random_inputs(model)
    data = [{"class_labels": label, "input_ids": row, "labels": row} for label, row in zip(class_labels, indices)]
    arguments = TrainingArguments(use_cpu=True, report_to=[], disable_tqdm=True)
    output = Trainer(model, arguments).predict(data)
    expected = model(class_labels, indices).logits.detach().numpy()
    assert output.predictions.shape == (2, 12, sum(vocab_sizes))
    assert abs(output.predictions - expected).max() < 1e-5
    assert output.label_ids.tolist() == indices.tolist()


def test_the_signature_of_forward_is_plain_to_everybody_else(make_ar):
    signature = inspect.signature(make_ar().forward)
    assert list(signature.parameters)[:3] == ["class_labels", "input_ids", "labels"]
    assert signature.bind(1, labels=2).arguments == {"class_labels": 1, "labels": 2}


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_ids_of_any_integer_type(make_ar, dtype, train):
    # A null class, and whole ids of 12 * 20 values, of which int8 holds half.
    model = make_ar(vocab_sizes=[12, 20], num_classes=120, class_dropout_prob=0.5).train(train)
    labels, ids = torch.tensor([3, 119]), torch.randint(127 if dtype == torch.int8 else 240, (2, 12))

    def run(convert):
        torch.manual_seed(0)
        return model(convert(labels), convert(ids), labels=convert(ids))

    expected, output = run(lambda values: values), run(lambda values: values.to(dtype))
    assert torch.equal(output.loss, expected.loss)
    assert train or torch.equal(output.logits, expected.logits)
    if not train:
        generate = [model.generate(given, guidance_scale=2.0, do_sample=False) for given in (labels, labels.to(dtype))]
        assert torch.equal(*generate)


@pytest.mark.parametrize("name", ["class_labels", "input_ids", "labels"])
def test_bool_is_no_id(make_ar, name):
    model = make_ar()
    class_labels, indices = random_inputs(model)
    inputs = {"class_labels": class_labels, "input_ids": indices, "labels": indices}
    with pytest.raises(ValueError, match=f"`{name}` must be integers.*bool"):
        model(**{**inputs, name: inputs[name].bool()})


@pytest.mark.parametrize("vocab_sizes", [[12], [4, 3]], ids=["1", "2"])
def test_hooks_on_the_input_embeddings(make_ar, vocab_sizes):
    model, seen = make_ar(vocab_sizes=vocab_sizes, class_dropout_prob=0.0).train(), []
    class_labels, indices = random_inputs(model)
    embeddings = model.get_input_embeddings()
    assert [name for name in model.state_dict() if "embed_tokens" in name] == [
        f"model.embed_tokens.{factor}.weight" for factor in range(len(vocab_sizes))
    ]
    plain = model(class_labels, indices).logits
    handle = embeddings.register_forward_hook(lambda module, args, output: seen.append(output) or output + 1.0)
    assert (model(class_labels, indices).logits - plain).abs().max() > 0.1
    assert len(seen) == 1 and torch.equal(seen[0], embeddings.forward(indices[:, :-1]))
    handle.remove()
    # As adapters need it, whose base model has no gradients.
    model.requires_grad_(False)
    model.lm_heads.requires_grad_(True)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": True})
    assert model(class_labels, indices, output_hidden_states=True).hidden_states[-1].requires_grad


def test_the_codebook_cannot_be_resized(make_ar):
    for model in (make_ar(), make_ar().model):
        with pytest.raises(NotImplementedError, match=r"`vocab_sizes` \[9\].*none can be added"):
            model.resize_token_embeddings(10)


@pytest.mark.parametrize(
    "name, values",
    {
        "num_classes": [0, -1, 2.0, "7", None, True, 10**12],
        "num_labels": [0, "7", 2.5],
        "vocab_sizes": [None, "ab", [3.0], [2**31, 2**31, 2**31]],
        "grid_size": [None, "ab", True, 2**40, [2, 2.0]],
        "hidden_size": ["a", -8, 0, True],
        "num_attention_heads": [0, -1],
        "num_hidden_layers": [0],
        "intermediate_size": [-4],
        "rope_theta": [math.nan, 0, -1.0, math.inf],
        "rms_norm_eps": [math.nan, -1e-5],
        "initializer_range": [math.nan, -0.02],
        "dropout": ["a", math.nan, True],
        "class_dropout_prob": [None],
        "id2label": [5, {0: 1}, {"x": "cat"}, ["cat"]],
    }.items(),
)
def test_config_names_what_is_wrong(name, values):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            IFSQARConfig(**{name: value})
    config = IFSQARConfig()
    if name == "num_classes":
        with pytest.raises(ValueError, match="`num_classes`.*expected int"):
            config.num_classes = "7"


@pytest.mark.parametrize(
    "inputs, name",
    [
        ({"class_labels": torch.zeros(2, 1, dtype=torch.long)}, "class_labels"),
        ({"input_ids": torch.zeros(3, 5, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(2, 13, dtype=torch.long)}, "input_ids"),
        ({"input_ids": [[1, 2]]}, "input_ids"),
        ({"past_key_values": ((), ())}, "past_key_values"),
    ],
)
def test_base_model_names_what_is_wrong(make_ar, inputs, name):
    right = {"class_labels": torch.tensor([1, 2]), "input_ids": torch.zeros(2, 5, dtype=torch.long)}
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        make_ar().model(**{**right, **inputs})


class Wrapped(torch.nn.Module):
    """A layer in another, as adapters wrap it: the attributes of the layer are gone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)


def test_embeddings_may_be_wrapped(make_ar):
    model = make_ar(vocab_sizes=[4, 3])
    class_labels, indices = random_inputs(model)
    expected = model(class_labels, indices).logits
    model.model.embed_classes = Wrapped(model.model.embed_classes)
    for factor in range(2):
        model.model.embed_tokens[factor] = Wrapped(model.model.embed_tokens[factor])
    assert torch.equal(model(class_labels, indices).logits, expected)
    assert model.generate(class_labels).shape == (2, 12)


def test_quantizers_leave_all_heads_alone(make_ar):
    model = make_ar(vocab_sizes=[4, 3])
    kept = get_keys_to_not_convert(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {name for name in linear if any(name.startswith(key) for key in kept)} == {"lm_heads.0", "lm_heads.1"}
    assert len(linear) == 2 + 4 * 4
