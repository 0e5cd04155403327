"""The backend by its name alone, in a process that never imports the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPT = Path(__file__).parents[2] / "actcompile" / "_gpt.py"

# Prints the losses of a run with torch.compile and of one with the backend.
SCRIPT = """
import json, runpy, sys, torch
from torch import nn

def gpt():
    model = runpy.run_path({gpt!r})["GPT"](layers=2, width=64, heads=2, vocabulary=96, tokens=64)
    ids = torch.randint(96, (8, 65))
    return model, lambda call: call(ids[:, :-1], ids[:, 1:])

def bert():
    import transformers
    config = transformers.BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, problem_type="single_label_classification",
        hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = transformers.BertForSequenceClassification(config).train()
    ids, labels = torch.randint(100, (8, 48)), torch.randint(2, (8,))
    return model, lambda call: call(input_ids=ids, labels=labels).loss

def resnet():
    block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), block,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    images, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    return model, lambda call: nn.functional.cross_entropy(call(images), labels)

def train(backend):
    torch.manual_seed(0)
    model, loss = {factory}()
    call = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range({steps}):
        optimizer.zero_grad()
        value = loss(call)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses

plain = train("inductor")
assert "actcompile" not in sys.modules
print(json.dumps([plain, train("act")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["gpt", "bert", "resnet"])
def test_losses_fall_as_with_torch_compile(factory: str) -> None:
    script = SCRIPT.format(gpt=str(GPT), factory=factory, steps=15)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, compressed = json.loads(done.stdout.splitlines()[-1])
    # The forward is exact.
    assert compressed[0] == pytest.approx(plain[0], rel=1e-5)
    fallen = plain[0] - plain[-1]
    assert fallen > 0.05 * plain[0]
    assert compressed[-1] == pytest.approx(plain[-1], abs=0.1 * fallen)
