"""``fastgan.nn.Embedding`` beside torch's, and in models that ``replace_modules`` has gone through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan.nn import Embedding

ROWS, WIDTH = 2**10, 2**8  # 1 MB


def model(**options):
    torch.manual_seed(0)
    table = nn.Embedding(ROWS, WIDTH, padding_idx=0, **options)
    return nn.ModuleDict({"large": table, "small": nn.Embedding(5, 4), "head": nn.Linear(WIDTH, ROWS, bias=False)})


def loss_of(parts, ids):
    return parts["head"](parts["large"](ids)).logsumexp(-1).sum() + parts["small"](ids % 5).square().sum()


@pytest.mark.parametrize("tied", [False, True])
def test_replaced_it_trains_as_before(tied):
    plain = model()
    if tied:
        plain["head"].weight = plain["large"].weight
    ours = fastgan.replace_modules(copy.deepcopy(plain))
    assert [type(ours[name]) for name in ("large", "small")] == [Embedding, nn.Embedding]
    assert (ours["head"].weight is ours["large"].weight) == tied
    ids = torch.randint(0, ROWS, (3, 7))
    ids[0, :2] = 0
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (plain, ours)]
    for _ in range(3):
        losses = []
        for each, optimizer in zip((plain, ours), optimizers, strict=True):
            losses.append(loss_of(each, ids))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    plain.load_state_dict(ours.state_dict())


def test_explain_says_why():
    parts = nn.ModuleDict({"large": nn.Embedding(ROWS, WIDTH), "small": nn.Embedding(5, 4),
                           "sparse": nn.Embedding(ROWS, WIDTH, sparse=True),
                           "clipped": nn.Embedding(ROWS, WIDTH, max_norm=1.0)})  # fmt: skip

    def rows():
        return {row.name: (row.state, row.becomes, row.reason) for row in fastgan.explain(parts)}

    assert rows()["large"] == ("will be swapped", "Embedding", "")
    fastgan.replace_modules(parts)
    found = rows()
    assert found["large"][:2] == ("swapped", "Embedding")
    assert [found[name][0] for name in ("small", "sparse", "clipped")] == ["left"] * 3
    for name, words in (("small", "smaller than 1 MB"), ("sparse", "sparse=True"), ("clipped", "max_norm")):
        assert words in found[name][2]
    kinds = [type(each) for each in parts.values()]
    fastgan.replace_modules(parts)
    assert kinds == [type(each) for each in parts.values()]


def test_from_torch_keeps_the_module():
    table = nn.Embedding(ROWS, WIDTH)
    weight, seen = table.weight, []
    table.register_forward_hook(lambda module, arguments, output: seen.append(output))
    assert Embedding.from_torch(table) is table
    assert table.weight is weight
    assert type(Embedding.from_torch(table)) is Embedding
    table(torch.tensor([1]))
    assert len(seen) == 1
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Embedding, got Linear"):
        Embedding.from_torch(nn.Linear(2, 2))

    class Own(nn.Embedding):
        pass

    with pytest.raises(TypeError, match="got Own"):
        Embedding.from_torch(Own(2, 2))


def test_a_bert_of_transformers_has_the_same_loss_and_gradients():
    transformers = pytest.importorskip("transformers", minversion="5.24")
    import fastgan.hf

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20_000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, hidden_dropout_prob=0.0,
                                     attention_probs_dropout_prob=0.0)  # fmt: skip
    plain = transformers.BertForSequenceClassification(config).train()
    ours = fastgan.replace_modules(copy.deepcopy(plain))
    assert type(ours.bert.embeddings.word_embeddings) is Embedding
    assert type(ours.bert.embeddings.position_embeddings) is nn.Embedding
    ids = torch.randint(1, 20_000, (2, 9))
    ids[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([1, 0])}
    expected, got = plain(**inputs).loss, ours(**inputs).loss
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    del got  # torch keeps the shape of a weight's gradient for as long as a graph over it lives
    ours.zero_grad()
    ours.resize_token_embeddings(20_100, mean_resizing=False)
    ours(**inputs).loss.backward()
    assert ours.bert.embeddings.word_embeddings.weight.grad.shape == (20_100, 16)
