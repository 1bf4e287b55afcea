"""SmolLM2-135M-Instruct, real weights: against transformers, and on every mesh that it fits."""

import argparse
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from warploom.models import hf
from warploom.models.batch import Batch
from warploom.parallel.mesh import Mesh
from warploom.recipes.runner.forward import language_model_terms, logits
from warploom.recipes.runner.sample import continue_ids

SMOL = Path(__file__).parents[2] / "smol"
LENGTH, ROWS = 512, 4
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SMOL / "config.json").exists(), reason="no smol/: run `make smol`"),
]


def _text():
    """Prose and code that no one trained on in this order: rows of 512 tokens."""
    tokenizer = Tokenizer.from_file(str(SMOL / "tokenizer.json"))
    text = Path(argparse.__file__).read_text() + Path(random.__file__).read_text()
    ids = torch.tensor(tokenizer.encode(text).ids[: ROWS * LENGTH + 1])
    return ids[:-1].view(ROWS, LENGTH), ids[1:].view(ROWS, LENGTH)


def _prompt():
    tokenizer = Tokenizer.from_file(str(SMOL / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    said = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
    return tokenizer, tokenizer.encode(said + "<|im_start|>assistant\n").ids


def _answer(model):
    tokenizer, ids = _prompt()
    stop = tokenizer.token_to_id("<|im_end|>")
    made = continue_ids(model, ids, count=16, vocabulary=49_152, stop=stop)
    return tokenizer.decode(made)


@pytest.fixture(scope="module")
def peer():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32).eval()


def test_logits_loss_and_the_answer_are_those_of_transformers(peer):
    from transformers import AutoTokenizer

    tokens, targets = _text()
    model = hf.load(SMOL)
    with torch.no_grad():
        ours, theirs = model(tokens), peer(tokens).logits
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # of 41 at most
        (term,) = model.loss(Batch(tokens, targets))
        expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    assert float(term.sum / term.count) == pytest.approx(float(expected), abs=1e-5)
    assert _answer(model) == ANSWER
    tokenizer = AutoTokenizer.from_pretrained(SMOL)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_dict=False,
        return_tensors="pt",
    )
    assert prompt[0].tolist() == _prompt()[1]
    made = peer.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True) == ANSWER


def test_bfloat16_is_at_most_twice_as_far_from_float32_as_transformers(peer):
    from transformers import AutoModelForCausalLM

    tokens, _ = _text()
    low = AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact = peer(tokens).logits
        theirs = (low(tokens).logits.float() - exact).abs()
        ours = (hf.load(SMOL, dtype=torch.bfloat16)(tokens).float() - exact).abs()
    assert ours.mean() <= 1.5 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()
    print(f"bf16 from float32, mean: {ours.mean():.4g}, transformers {theirs.mean():.4g}")


def _on_mesh(folder, text, expected, loss):
    mesh = Mesh.build(text)
    model = hf.load(folder, mesh)
    tokens, targets = _text()
    ways = mesh.degree("dp")
    mine = mesh.coordinate("dp")
    own = slice(mine * ROWS // ways, (mine + 1) * ROWS // ways)
    terms = language_model_terms(model, [Batch(tokens[own], targets[own])], mesh)
    total = torch.zeros(2, dtype=torch.float64)
    for term in terms:
        total += torch.tensor([float(term.sum), float(term.count)], dtype=torch.float64)
    torch.distributed.all_reduce(total)  # tp ranks each have the sums of all: the ratio stays
    assert float(total[0] / total[1]) == pytest.approx(loss, abs=1e-5), text
    found = logits(model, expected["tokens"], mesh)
    torch.testing.assert_close(found, expected["logits"], atol=2e-4, rtol=0)
    assert _answer(model) == ANSWER, text


@pytest.mark.parametrize("text", ["tp3", "pp2", "cp2", "dp4"])
def test_every_mesh_gives_the_same(ranks, text):
    model = hf.load(SMOL)
    tokens, targets = _text()
    with torch.no_grad():
        (term,) = model.loss(Batch(tokens, targets))
        expected = {"tokens": tokens[:1, :64], "logits": model(tokens[:1, :64])}
    loss = float(term.sum / term.count)
    del model
    ranks(int(text[-1]), _on_mesh, SMOL, text, expected, loss, timeout=600)


def _refuses(folder):
    size = torch.distributed.get_world_size()
    near = {2: "tp1 and tp3 do", 4: "tp3 does"}[size]
    with pytest.raises(ValueError, match=rf"tp \({size}\) must divide heads \(9\), .*: {near}$"):
        hf.load(folder, Mesh.build(f"tp{size}"))


@pytest.mark.parametrize("size", [2, 4])
def test_heads_that_cannot_be_split_are_refused(ranks, size):
    ranks(size, _refuses, SMOL)


def test_an_export_carries_everything_and_no_bit_is_lost(tmp_path):
    model = hf.load(SMOL)
    hf.save(model, tmp_path / "again", SMOL, shard_bytes=200_000_000)
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (SMOL / name).read_bytes()
    assert "chat_template" in json.loads((SMOL / "tokenizer_config.json").read_text())
    again = hf.load(tmp_path / "again")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
