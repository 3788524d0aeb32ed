"""Recipes, and a training that survives a kill."""

import errno
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dvexport.errors import CheckpointError, UsageError
from dvexport.models import zoo
from dvexport.models.checkpoints.checkpoint import read_metadata
from dvexport.models.training.evaluate import dense_macs, evaluate, normalised
from dvexport.models.training.motion import CLASSES, SPLITS, MotionDataset
from dvexport.models.training.recipe import load_recipe
from dvexport.models.training.train import train
from dvexport.models.training.training_state import Files, find_weights, half_precision_weights, load_state

pytestmark = pytest.mark.slow

TINY = """
name = "tiny"
model = "dstep_paper_resnet18"
settings = { width = 0.125, hidden = 8, shared_policies = false, dropout = 0.2 }
[data]
size = 32
frames = 4
clips_per_epoch = 24
validation_clips = 12
[optimiser]
epochs = 2
batch = 12
[gates]
target = 0.5
warmup_epochs = 0.5
alpha = 1.0
beta = 0.5
relax_epochs = 1.5
noise_until = 1.5
"""


TINY_VIT = """
name = "tiny_vit"
model = "vit_small"
settings = { depth = 3, embed_dim = 8, heads = 2, patch = 8 }
[data]
size = 16
frames = 4
clips_per_epoch = 32
validation_clips = 12
mirrored = true
[optimiser]
epochs = 2
batch = 16
[transformer]
embedding_clips = 4
gain = 2.0
hints = 0.5
still_epochs = 0.5
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Sums depend on the number of threads in their last bits; comparisons to the bit fix it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_validation(monkeypatch):
    monkeypatch.setitem(SPLITS, "validation", 24)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_dense_macs_are_those_of_the_layers():
    model = zoo.create("tsn_resnet18", width=1.0, size=224, classes=174)
    assert dense_macs(model, (224, 224)) * 8 / 1e9 == pytest.approx(14.51, abs=0.01)


def test_training_resumes_after_a_kill_with_the_same_weights(tiny, tmp_path, short_validation):
    whole = train(tiny, output=tmp_path / "whole", device="cpu", progress=lambda line: None)
    script = (
        "from pathlib import Path; from dvexport.models.training.motion import SPLITS; SPLITS['validation'] = 24\n"
        "import torch; torch.set_num_threads(1)\n"
        "from dvexport.models.training.train import train\n"
        f"train({str(tiny)!r}, output=Path({str(tmp_path / 'killed')!r}), device='cpu',"
        " progress=lambda line: print(line, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert "epoch 1/2" in process.stdout.readline()
        process.kill()
    assert not (tmp_path / "killed" / "tiny.safetensors").exists()
    lines = []
    resumed = train(tiny, output=tmp_path / "killed", device="cpu", progress=lines.append)
    assert "resumed after epoch 1 of 2" in lines[0]
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()
    records = [json.loads(line) for line in resumed.curves.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert {"loss", "task", "sparsity", "bound", "train_fraction", "accuracy", "executed"} <= set(records[0])


def test_an_interrupted_epoch_is_done_again(tiny, tmp_path, short_validation, monkeypatch):
    from dvexport.models.training import train as training

    whole = train(tiny, output=tmp_path / "whole", device="cpu", progress=lambda line: None)
    steps = []
    take_step = training._Run._step

    def interrupted(run, indices, epoch):
        steps.append(epoch)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return take_step(run, indices, epoch)

    monkeypatch.setattr(training._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, output=tmp_path / "cut", device="cpu", progress=lambda line: None)
    assert steps == [0.0, 0.5, 1.0, 1.5]
    resumed = train(tiny, output=tmp_path / "cut", device="cpu", progress=lambda line: None)
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()


@pytest.fixture
def tiny_vit(tmp_path):
    path = tmp_path / "tiny_vit.toml"
    path.write_text(TINY_VIT)
    return path


def test_a_whole_clip_model_trains_and_resumes_with_the_same_weights(tiny_vit, tmp_path, short_validation, monkeypatch):
    from dvexport.models.training import train as training

    whole = train(tiny_vit, output=tmp_path / "whole", device="cpu", progress=lambda line: None)
    take_step = training._Run._step

    def interrupted(run, indices, epoch):
        if epoch >= 1:
            raise KeyboardInterrupt
        return take_step(run, indices, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_vit, output=tmp_path / "cut", device="cpu", progress=lambda line: None)
    lines = []
    resumed = train(tiny_vit, output=tmp_path / "cut", device="cpu", progress=lines.append)
    assert "resumed after epoch 1 of 2" in lines[0]
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()
    record = json.loads(resumed.curves.read_text().splitlines()[1])
    assert record["loss"] == pytest.approx(record["task"] + 0.5 * record["hints"], rel=1e-4)
    assert not [key for key in load_file(resumed.weights) if "hints" in key]
    # A row of logits per clip: as many predictions as labels, and those of the clips one by one.
    model = zoo.create("vit_small", resumed.weights)
    assert model.config.depth == 3
    data = MotionDataset("validation", 16, 4)
    found = evaluate(model, data, batch=5)
    assert found.predictions == resumed.evaluation.predictions
    assert len(found.predictions) == len(found.labels) == 24
    with torch.no_grad():
        alone = [int(model(normalised(data.batch([i])[0], model)).argmax()) for i in range(24)]
    assert alone == found.predictions


def test_the_steps_of_a_mirrored_training_render_an_eighth(tiny_vit, monkeypatch):
    from dvexport.models.training import train as training

    seen = []
    tiny_vit.write_text(TINY_VIT.partition("[transformer]")[0])
    monkeypatch.setattr(training._Run, "_losses", lambda run, frames, labels, epoch: seen.append((frames, labels)) or {
        "loss": sum(p.sum() * 0 for p in run.model.parameters())})  # fmt: skip
    monkeypatch.setattr(training._Run, "_score", lambda run: {})
    run = training._Run(load_recipe(tiny_vit), torch.device("cpu"))
    run.train_epoch(lambda line: None)
    rendered = MotionDataset("train", 16, 4).batch([0, 1, 2, 3])
    assert [frames.shape[0] for frames, _ in seen] == [16, 16]
    assert torch.equal(torch.cat([frames[:2] for frames, _ in seen]), rendered[0])
    assert torch.equal(torch.cat([labels[:2] for _, labels in seen]), rendered[1])


def test_macs_of_a_whole_clip_model_include_attention():
    model = zoo.create("vit_small", depth=2, embed_dim=8, heads=2, patch=8, size=16, frames=4, classes=12)
    tokens, dim = 2 * 2 * 2, 8
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    embedding, head = tokens * dim * 3 * 2 * 8 * 8, dim * 12
    assert dense_macs(model, (16, 16)) == (2 * block + embedding + head) // 4


def test_a_slow_epoch_tells_how_far_it_is(tiny, tmp_path, short_validation, monkeypatch):
    from dvexport.models.training import train as training

    monkeypatch.setattr(training, "_SECONDS_BETWEEN_LINES", 0)
    lines = []
    train(tiny, output=tmp_path, device="cpu", epochs=1, progress=lines.append)
    assert "tiny: epoch 1, step 1/2  loss" in lines[0]
    assert "tiny: epoch 1, step 2/2  loss" in lines[1]
    assert "epoch 1/1" in lines[2]


def test_a_full_disk_loses_nothing(tiny, tmp_path, short_validation, monkeypatch):
    from pathlib import Path

    train(tiny, output=tmp_path / "out", device="cpu", epochs=2, progress=lambda line: None)
    files = Files(tmp_path / "out", "tiny")
    before = files.state.read_bytes()
    files.weights.unlink()

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="disk is full"):
        train(tiny, output=tmp_path / "out", device="cpu", epochs=2, progress=lambda line: None)
    assert files.state.read_bytes() == before
    assert sorted(p.name for p in files.folder.iterdir()) == ["tiny.jsonl", "tiny.state.pt"]


def test_trained_weights_rebuild_the_model(tiny, tmp_path, short_validation):
    trained = train(tiny, output=tmp_path, device="cpu", epochs=1, progress=lambda line: None)
    about = read_metadata(trained.weights)
    assert about["labels"] == list(CLASSES)
    assert about["accuracy"] == trained.evaluation.accuracy
    assert about["executed_gmacs"] == trained.evaluation.executed_gmacs < trained.evaluation.dense_gmacs
    assert about["recipe"]["gates"]["target"] == 0.5
    model = zoo.create("dstep_paper_resnet18", trained.weights)
    assert model.preprocess.size == (32, 32)
    assert model.preprocess.frames == 4
    found = evaluate(model, MotionDataset("validation", 32, 4), batch=7)
    assert found.predictions == trained.evaluation.predictions
    assert found.gates.keys() == {f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)}
    shares = found.gates["layer1.0"]
    assert shares.skip + shares.reuse + shares.compute == pytest.approx(1)


def test_shared_layers_are_stored_once():
    model = zoo.create("dstep_paper_resnet18", width=0.125, hidden=8, size=32, frames=4)
    tensors = half_precision_weights(model)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert tensors["conv1.weight"].dtype == torch.float16
    assert tensors["bn1.running_var"].dtype == torch.float32


def test_the_camera_stands_still_at_first(tiny_vit):
    from dvexport.models.training import train as training

    run = training._Run(load_recipe(tiny_vit), torch.device("cpu"))
    drifts = []
    for epoch in (0, 0.5, 0.75, 1, 1.9):
        run._step(torch.arange(2), epoch)
        drifts.append(run.data.drift)
    assert drifts == [0, 0, 0.5, 1, 1]
    still, moving = MotionDataset("train", 16, 4), MotionDataset("train", 16, 4)
    still.drift = 0.0
    assert still.scene([0]).camera_x.abs().max() == 0 < moving.scene([0]).camera_x.abs().max()
    assert torch.equal(still.scene([0]).x, moving.scene([0]).x)


def test_the_learning_rate_may_decay_at_the_end_only(tiny_vit):
    from dvexport.models.training.train import _learning_rate

    def rates(options, epochs=(0.5, 1, 3, 6, 7, 8)):
        tiny_vit.write_text(TINY_VIT.replace("epochs = 2", f"learning_rate = 1.0\n{options}"))
        return [_learning_rate(load_recipe(tiny_vit), epoch) for epoch in epochs]

    assert rates("epochs = 8\ndecay_epochs = 2") == pytest.approx([0.5, 1, 1, 1, 0.5, 1e-4])
    # Before the decay an epoch does not know how many there are.
    assert rates("epochs = 8\ndecay_epochs = 2")[:4] == rates("epochs = 20\ndecay_epochs = 5")[:4]
    assert rates("epochs = 8") == rates("epochs = 8\ndecay_epochs = 8")
    assert rates("epochs = 8")[3] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 6 / 8))
    with pytest.raises(UsageError, match=r"decay_epochs = 9.0\n.*\n.*from 0 to epochs, 8"):
        rates("epochs = 8\ndecay_epochs = 9")


@pytest.mark.parametrize(("option", "dtype"), [("", torch.float32), ("half = true", torch.bfloat16)])
def test_a_recipe_may_multiply_in_half_precision_on_a_cpu(tiny_vit, option, dtype):
    from dvexport.models.training import train as training

    tiny_vit.write_text(TINY_VIT.replace("epochs = 2", f"epochs = 2\n{option}"))
    run, seen = training._Run(load_recipe(tiny_vit), torch.device("cpu")), []
    run.model.head.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    run._step(torch.arange(2), 0.5)
    assert seen == [dtype]
    assert all(weight.dtype == torch.float32 and weight.grad.isfinite().all() for weight in run.model.parameters())
    # A recipe from before there was the choice is the same recipe still.
    assert ("half" in load_recipe(tiny_vit).to_dict()["optimiser"]) == bool(option)


@pytest.mark.parametrize(
    ("change", "message"),
    [(("gain = 2.0", "gain = 0"), "gain = 0"), (("hints = 0.5", "hints = -1"), "hints = -1"),
     (("vit_small", "tsn_resnet18"), "unknown|no ViT")],
)  # fmt: skip
def test_a_bad_help_for_transformers_is_one_clear_error(tiny_vit, tmp_path, change, message):
    tiny_vit.write_text(TINY_VIT.replace(*change))
    with pytest.raises(UsageError, match=message):
        train(tiny_vit, output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_mirror_images_come_in_eights(tiny_vit):
    tiny_vit.write_text(TINY_VIT.replace("batch = 16", "batch = 12"))
    with pytest.raises(UsageError, match=r"batch = 12 of mirrored clips\n.*\n.*a multiple of 8"):
        load_recipe(tiny_vit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name = ", "nom = "), "unknown option 'nom'"),
        (("epochs = 2", ""), "optimiser: 'epochs' is missing"),
        (("[optimiser]", "[optimizer]"), "did you mean optimiser"),
        (("batch = 12", 'batch = "twelve"'), "option batch can't be 'twelve'"),
        (("batch = 12", "batch = 25"), "from 1 to clips_per_epoch, 24"),
        (("target = 0.5", "target = 1.5"), "target = 1.5"),
        (("noise_until = 1.5", "noise_until = -1"), "noise_until = -1"),
        (("target = 0.5", ""), "gates: 'target' is missing"),
        (("size = 32", 'name = "kinetics"'), "no data set 'kinetics'"),
        (("width", "breadth"), "unknown option 'breadth'"),
        (("dstep_paper_resnet18", "tsn_resnet18"), "unknown|no gates"),
        (("[data]", "[data"), "can't be read"),
    ],
)
def test_a_bad_recipe_is_one_clear_error(tiny, tmp_path, change, message):
    tiny.write_text(TINY.replace(*change))
    with pytest.raises(UsageError, match=message):
        train(tiny, output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_one_clear_error(tiny, tmp_path, short_validation):
    with pytest.raises(UsageError, match="no recipe 'nothing'"):
        load_recipe("nothing")
    with pytest.raises(UsageError, match="no device 'abacus' here"):
        train(tiny, output=tmp_path, device="abacus")
    with pytest.raises(UsageError, match="0 epochs"):
        train(tiny, output=tmp_path, epochs=0)
    train(tiny, output=tmp_path, device="cpu", epochs=1, progress=lambda line: None)
    with pytest.raises(UsageError, match="another recipe"):
        train(tiny, output=tmp_path, device="cpu", epochs=2)
    state = Files(tmp_path, "tiny").state
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(Files(tmp_path, "tiny"), "any")


def test_a_recipe_starts_from_the_weights_of_another(tiny, tmp_path, short_validation):
    """The first step sees the weights that were trained, with the gates' decisions they make."""
    first = train(tiny, output=tmp_path, device="cpu", epochs=1, progress=lambda line: None)
    second = tmp_path / "second.toml"
    second.write_text(
        TINY.replace('name = "tiny"', 'name = "second"\nstart_from = "tiny"')
        .replace("epochs = 2", "epochs = 1\nlearning_rate = 1e-9")
        .replace("size = 32", "size = 64")
        .replace("relax_epochs = 1.5", "relax_epochs = 0")
        .replace("noise_until = 1.5", "noise_until = 0")
    )
    lines = []
    trained = train(second, output=tmp_path, device="cpu", progress=lines.append)
    assert lines[0] == f"second: starts from {first.weights}"
    before, after = load_file(first.weights), load_file(trained.weights)
    assert before.keys() == after.keys()
    for key in (key for key in before if before[key].ndim >= 2):
        assert torch.allclose(before[key].float(), after[key].float(), atol=1e-3), key
    assert read_metadata(trained.weights)["recipe"]["start_from"] == "tiny"
    assert read_metadata(trained.weights)["preprocess"]["size"] == [64, 64]


def test_weights_to_start_from_are_a_file_a_training_s_or_ship(tmp_path):
    own = tmp_path / "mine.safetensors"
    own.write_bytes(b"")
    assert find_weights(str(own), tmp_path / "elsewhere") == own
    assert find_weights("mine", tmp_path) == own
    assert find_weights("tsn_motion", tmp_path).parent == zoo.weights_folder()


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ("nothing", UsageError, r"no weights 'nothing' to start from\n  where: .*\n  try: a safetensors file"),
        ("dstep_motion_d40_160", UsageError, "try: first `dvexport train dstep_motion_d40_160 -o "),
        ("tiny", UsageError, "start_from = 'tiny', its own name"),
        ("tsn_motion", CheckpointError, "keys don't fit the model"),
    ],
)
def test_weights_that_are_not_there_or_do_not_fit_are_one_clear_error(tiny, tmp_path, start, error, message):
    tiny.write_text(TINY.replace('name = "tiny"', f'name = "tiny"\nstart_from = "{start}"'))
    with pytest.raises(error, match=message):
        train(tiny, output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
