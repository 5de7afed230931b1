"""What a user's day does to a run: Ctrl-C, preemption, kills, damaged files, full disks, bad input."""

import os
import pickle
import re
import resource
import shlex
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_scale.models import BertMLM

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:Encountered `nan`"),
]

RUN = "runs/bert_progressive_stack"
LAST = f"{RUN}/checkpoints/last.ckpt"


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
    return printed.err


# -- signals: real processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_saves_and_prints_the_command_that_goes_on(tiny, same_run, await_file):
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143}
    flags = ["--trainer.max_steps=400", "--data.num_workers=1"]
    whole = tiny.start(*flags, "--trainer.default_root_dir=whole")
    for number, code in signals.items():
        root = number.name
        parts = tiny.start(*flags, f"--trainer.default_root_dir={root}")
        await_file(tiny.folder / root / "checkpoints" / "last.ckpt", parts)
        os.killpg(parts.pid, number)  # as a terminal and a scheduler do: the loader's workers get it too
        out, err = parts.communicate(timeout=240)
        assert parts.returncode == code, out + err
        assert err == ""
        (command,) = re.findall(rf"^{root}: saved \S+; resume with: (.*)$", out, re.M)
        again = tiny.start(command=shlex.split(command))
        out, err = again.communicate(timeout=240)
        assert again.returncode == 0, out + err
        assert not list((tiny.folder / root).glob("earlier-*"))
    assert whole.wait(timeout=240) == 0
    for number in signals:
        same_run(tiny, "whole", number.name)


KILLER = """
    import os, random, runpy, signal, sys, time
    from pathlib import Path
    import lightning.pytorch.cli, timm.optim  # what takes long, once

    recipe, seed, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    rng, config, last = random.Random(seed), Path("parts/config.yaml"), Path("parts/checkpoints/last.ckpt")

    def start(*more):
        child = os.fork()
        if child == 0:
            sys.argv = [recipe, *flags, *more]
            sys.stdout = sys.stderr = open("log.txt", "a")
            code = 1
            try:
                runpy.run_path(recipe, run_name="__main__")
                code = 0
            except SystemExit as error:
                code = error.code
            finally:
                os._exit(code or 0)
        return child

    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start("--trainer.default_root_dir=whole"), 0)[1]) == 0
    length = time.monotonic() - begun
    killed = []
    for _ in range(40):
        before = config.stat().st_mtime_ns if config.exists() else 0
        resume = [f"--ckpt_path={last}"] if last.exists() else []
        child = start("--trainer.default_root_dir=parts", *resume)
        if len(killed) == 20:
            break
        while not (config.exists() and config.stat().st_mtime_ns > before):  # until training starts
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, length / 16))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed.append(last.stat().st_mtime_ns if last.exists() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print(len(killed), len(set(killed)))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments_change_nothing(tiny, run_python, same_run):
    flags = [*tiny.flags, "--trainer.max_steps=600", "--trainer.val_check_interval=10", "--data.max_val_sequences=4"]
    flags += ["--trainer.check_val_every_n_epoch=null"]
    recipe = Path(__file__).parents[2] / "recipes" / "bert_progressive_stack.py"
    done = run_python(KILLER, recipe, "5", *flags, timeout=560, env=tiny.environment, cwd=tiny.folder)
    assert done.returncode == 0, done.stderr + (tiny.folder / "log.txt").read_text()[-2000:]
    kills, places = map(int, done.stdout.split())
    assert kills == 20
    assert places > 5, "the kills were not spread over the run"
    same_run(tiny, "whole", "parts")
    assert not list((tiny.folder / "parts" / "checkpoints").glob("*.tmp")), "what the kills left was swept"


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny):
    """A run of 8 steps with a checkpoint at its middle."""
    assert tiny.here("--trainer.max_steps=4") == 0
    return tiny


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "truncated"),
        (flip, "does not match its checksum"),
        (lambda data: b"", "the file is empty"),
        (lambda data: b"hello", "not a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named(stopped, capsys, damage, message):
    good = stopped.folder / LAST
    bad = good.with_name("bad.ckpt")
    bad.write_bytes(damage(good.read_bytes()))
    capsys.readouterr()
    assert stopped.here(f"--ckpt_path={bad}") == 1
    error = one_error(capsys)
    assert message in error
    assert str(bad) in error
    assert f"newest intact checkpoint beside it: {good}" in error


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_refused_and_not_run(stopped, capsys):
    checkpoint = torch.load(LAST, weights_only=True)
    torch.save(checkpoint | {"callbacks": {"x": Payload()}}, "evil.ckpt")
    Path("bare.ckpt").write_bytes(pickle.dumps(Payload()))
    capsys.readouterr()
    for name in ("evil.ckpt", "bare.ckpt"):
        assert stopped.here(f"--ckpt_path={name}") == 1
        assert re.search(r"posix.system|nt.system", one_error(capsys))
    assert not Path("executed").exists()


def test_a_folder_and_a_foreign_archive_are_no_checkpoints(stopped, capsys):
    with zipfile.ZipFile("other.ckpt", "w") as archive:
        archive.writestr("a.txt", "text")
    torch.save({"weight": torch.zeros(2)}, "weights.ckpt")
    capsys.readouterr()
    for name, message in (("runs", "a folder"), ("other.ckpt", "not a checkpoint"), ("weights.ckpt", "state_dict")):
        assert stopped.here(f"--ckpt_path={name}") == 1
        assert message in one_error(capsys)


def test_the_technique_can_not_be_left_out_at_resume(stopped, capsys):
    capsys.readouterr()
    assert stopped.here(f"--ckpt_path={LAST}", "--baseline") == 1
    assert "was trained with ProgressiveStacking: leave out --baseline" in one_error(capsys)
    assert stopped.here(f"--ckpt_path={LAST}", "--model.depth=8") == 1
    assert "depth (was 4, is 8)" in one_error(capsys)


# -- disks ------------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written_is_told_before_training(tiny, capsys, monkeypatch):
    Path("file").write_text("")
    assert tiny.here("--trainer.default_root_dir=file/run") == 1
    assert "cannot write" in one_error(capsys)
    monkeypatch.setenv("LIT_SCALE_CACHE", "file/cache")
    assert tiny.here() == 1
    assert "cache_dir" in one_error(capsys)
    if os.geteuid():  # root writes everywhere
        Path("closed").mkdir(mode=0o500)
        assert tiny.here("--trainer.default_root_dir=closed/run") == 1
        assert "cannot write" in one_error(capsys)


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tiny):
    assert tiny.here("--trainer.max_steps=4", "--model.width=128") == 0
    size = Path(LAST).stat().st_size
    before = Path(LAST).read_bytes()
    limit = size * 3 // 4  # no file can grow beyond this, which is how a full disk looks

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = tiny.start("--model.width=128", "--ckpt_path", LAST, preexec_fn=full)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, out + err
    assert re.fullmatch(r"error: cannot write \S+last.ckpt: [^\n]+\n", err), err
    assert Path(LAST).read_bytes() == before
    assert sorted(path.name for path in Path(LAST).parent.iterdir()) == ["last.ckpt"]


# -- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"a", "is too short: 2 tokens for training"),
        (bytes(range(256)) * 20, "is not text"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_is_told(tiny, capsys, content, message):
    Path("text").write_bytes(content)
    assert tiny.here("--data.corpus=text") == 1
    error = one_error(capsys)
    assert message in error
    assert "corpus='text'" in error
    assert not Path(RUN, "config.yaml").exists(), "the run never started"


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--model.depth=6", 1, "0.25 of 6 blocks is 1.5, not a whole number"),
        ("--progressive_stacking.stages=[[0,1],[0.6,2],[0.3,4]]", 1, "starts must ascend"),
        ("--progressive_stacking.stages=[[0,1],[1.0,4]]", 1, "stay below 1.0"),
        ("--progressive_stacking.stages=[[0,4],[0.5,8]]", 1, "depth 8 is more than the 4 blocks of the model"),
        ("--progressive_stacking.stage=[[0,4]]", 2, "did you mean --progressive_stacking.stages?"),
        ("--model.max_length=3", 2, "data.sequence_length"),
    ],
)
def test_flags_that_cannot_work_are_told(tiny, capsys, flag, code, message):
    stages = [] if "stages" in flag else ["--progressive_stacking.stages=[[0,0.25],[0.5,1.0]]"]
    assert tiny.here(*stages, flag) == code
    assert message in one_error(capsys)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_explodes_stops_before_the_weights(tiny, capsys):
    assert tiny.here("--model.lr=1e30", "--trainer.limit_val_batches=0") == 1
    error = one_error(capsys)
    assert re.search(r"the loss is (nan|inf), before optimizer step \d", error)
    assert "lower learning rate" in error


def test_a_corrupted_weight_stops_the_run_and_the_checkpoint_stays_good(tiny, capsys, monkeypatch):
    step = BertMLM.training_step

    def corrupt(self: BertMLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 5:
            with torch.no_grad():
                self.head_bias[0] = float("nan")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(BertMLM, "training_step", corrupt)
    assert tiny.here("--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=null") == 1
    assert "the loss is nan, before optimizer step 6" in one_error(capsys)
    checkpoint = tiny.checkpoint()
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    monkeypatch.setattr(BertMLM, "training_step", step)
    assert tiny.here(f"--ckpt_path={LAST}") == 0
    assert tiny.record()["steps"] == 8


@pytest.mark.slow
def test_an_error_in_a_process_of_its_own_is_one_line(tiny):
    process = tiny.start("--data.corpus=[/no/such/file]")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, out + err
    assert re.fullmatch(r"error: corpus='/no/such/file' matches no file[^\n]+\n", err), err
