"""`forward` of the AR model and of the DiT reads no value: it runs on fake tensors, and compiles and exports whole."""

import copy
import pickle

import pytest
import torch
from accelerate.utils import compile_regions
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode


AR_CASES = [(vocab_sizes, labelled) for vocab_sizes in ([12], [4, 3]) for labelled in (False, True)]
AR_IDS = [f"{len(vocab_sizes)}-factor{'-labels' * labelled}" for vocab_sizes, labelled in AR_CASES]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()


def ar_inputs(model, labelled=True):
    indices = torch.randint(model.config.codebook_size, (2, model.config.num_tokens))
    return {"class_labels": torch.tensor([1, 3]), "input_ids": indices} | ({"labels": indices} if labelled else {})


def dit_inputs():
    return {
        "hidden_states": torch.randn(2, 3, 4, 6),
        "timestep": torch.tensor([0.2, 0.9]),
        "class_labels": torch.tensor([1, 3]),
    }


@pytest.fixture(params=["ar", "dit"])
def model_and_inputs(request, make_ar, make_dit):
    """A model without dropout, and what it is trained on."""
    if request.param == "dit":
        return make_dit(class_dropout_prob=0.0), dit_inputs()
    model = make_ar(vocab_sizes=[4, 3], class_dropout_prob=0.0)
    return model, ar_inputs(model)


def gradients(model, call, inputs):
    """Of a loss that all outputs count in."""
    model.zero_grad()
    output = call(**inputs, output_hidden_states=True)
    loss = output.loss if "labels" in inputs else output.sample.square().mean()
    (loss + output.hidden_states[1].square().mean()).backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("vocab_sizes, labelled", AR_CASES, ids=AR_IDS)
def test_forward_of_the_ar_model_reads_no_value(make_ar, vocab_sizes, labelled, train):
    with FakeTensorMode():
        model = make_ar(vocab_sizes=vocab_sizes, dropout=0.1, class_dropout_prob=0.1).train(train)
        output = model(**ar_inputs(model, labelled))
    assert (output.loss is not None) == labelled
    if train and labelled:
        assert output.logits is None
    else:
        assert output.logits.shape == (2, 12, sum(vocab_sizes))


@pytest.mark.parametrize("train", [False, True])
def test_forward_of_the_dit_reads_no_value(make_dit, train):
    with FakeTensorMode():
        assert make_dit().train(train)(**dit_inputs()).sample.shape == (2, 3, 4, 6)


def test_cached_forward_reads_no_value(make_ar):
    with FakeTensorMode():
        model = make_ar()
        labels, ids, _ = ar_inputs(model).values()
        past = model(labels, ids[:, :5], use_cache=True).past_key_values
        assert model(None, ids[:, 4:9], past_key_values=past).logits.shape == (2, 4, 9)


@pytest.mark.parametrize("how", ["torch.compile", "in place", "regions"])
def test_compiled_training_equals_eager(model_and_inputs, how):
    model, inputs = model_and_inputs
    model.train()
    loss, expected = gradients(model, model, inputs)
    options = {"fullgraph": True, "backend": "aot_eager"}
    if how == "torch.compile":
        call = torch.compile(model, **options)
    elif how == "regions":
        # Also norms and heads are regions, more than the compiler makes code for without falling back on eager ones.
        call = compile_regions(model, backend="aot_eager")
    else:
        model.compile(**options)
        call = model
    compiled_loss, got = gradients(model, call, inputs)
    assert compiled_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(got, expected)
    assert counters["stats"]["unique_graphs"] > 0 and (how == "regions" or not counters["graph_break"])
    # Validation between the steps of training, with the same object.
    with torch.no_grad():
        model.eval(), call.eval()
        output = call(**inputs)
    assert (output.logits if "labels" in inputs else output.sample).isfinite().all()


def test_compiled_blocks(make_dit):
    model, inputs = make_dit(), dit_inputs()
    expected = model(**inputs).sample
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(**inputs).sample, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@torch.no_grad()
def test_copies_of_a_compiled_model(model_and_inputs, tmp_path):
    model, inputs = model_and_inputs
    output = "logits" if "labels" in inputs else "sample"
    expected = model(**inputs)[output]
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(**inputs)[output], expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(other(**inputs)[output], expected)
        # Its weights are its own.
        other.get_parameter(next(iter(dict(other.named_parameters())))).neg_()
        assert not torch.allclose(other(**inputs)[output], expected)
        torch.testing.assert_close(model(**inputs)[output], expected)


def test_regions_of_the_ar_model_generate(make_ar):
    model, labels = make_ar(vocab_sizes=[4, 3]), torch.tensor([1, 3])
    expected = model.generate(labels, do_sample=False)
    compiled = compile_regions(model, backend="eager")
    assert torch.equal(compiled.generate(labels, do_sample=False), expected)


@pytest.mark.parametrize("vocab_sizes", [[12], [4, 3]], ids=["1-factor", "2-factor"])
def test_export_of_the_ar_model(make_ar, vocab_sizes):
    model = make_ar(vocab_sizes=vocab_sizes)
    inputs = ar_inputs(model, labelled=False)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs).module()
        torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits)


def test_export_for_any_batch(make_ar, make_dit):
    batch = torch.export.Dim("batch", min=1, max=64)
    for model, inputs in (
        (ar := make_ar(vocab_sizes=[4, 3], class_dropout_prob=0.0), ar_inputs(ar)),
        (make_dit(), dit_inputs()),
    ):
        more = {name: torch.cat([values, values, values]) for name, values in inputs.items()}
        with torch.no_grad():
            exported = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})
            torch.testing.assert_close(exported.module()(**more).to_tuple()[0], model(**more).to_tuple()[0])
