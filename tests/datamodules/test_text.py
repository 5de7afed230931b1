import doctest
import errno
import functools
import json
import math
import os
import pickle
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

import tests.support.training as support
from lit_scale.datamodules import TextDataModule, cache, corpus, loader, masking, text
from lit_scale.datamodules.corpus import read_documents, split_documents
from tests.support.equality import same
from tests.support.networks import Reader

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

RunPython = Callable[..., subprocess.CompletedProcess[str]]
Build = Callable[..., Any]


@pytest.fixture
def build(tiny_corpus: Path, tmp_path: Path) -> Build:
    """Make a data module of the tiny corpus and set it up."""

    def make(setup: bool = True, **settings: Any) -> Any:
        defaults: dict[str, Any] = {"corpus": str(tiny_corpus), "cache_dir": str(tmp_path / "cache"), "batch_size": 8}
        settings = defaults | settings
        if settings.get("tokenizer") == "bpe":
            settings.setdefault("vocab_size", 400)
        data = TextDataModule(**settings)
        if setup:
            data.prepare_data()
            data.setup("fit")
        return data

    return make


def texts_of(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


def all_batches(loader: Any) -> list[dict[str, torch.Tensor]]:
    return list(loader)


# ---- documents


def test_documents_are_distinct_files_with_text(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": b"one",
        "b/c/d.md": b"two",
        "b/copy.txt": b"one",
        "empty.txt": b"",
        "image.png": b"\x89PNG\0",
        "latin.txt": "\xe9t\xe9".encode("latin-1"),
        ".hidden": b"three",
        ".git/config": b"four",
        "\u00fc.txt": "f\u00fcnf".encode(),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = read_documents(str(tmp_path))
    assert sorted(found.values()) == [b"f\xc3\xbcnf", b"one", b"two"]
    assert list(found) == sorted(found)
    assert read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b")]).keys() < found.keys()
    assert sorted(read_documents(str(tmp_path / "**/*.[tm]*")).values()) == sorted(found.values())


def test_files_that_are_not_text_are_counted_once(
    build: Build, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_corpus / "weights.bin").write_bytes(b"\0\1\2")
    (tiny_corpus / "latin.txt").write_bytes(b"\xe9t\xe9")
    said: list[str] = []
    monkeypatch.setattr(corpus, "rank_zero_info", said.append)
    build().setup("validate")
    assert said == ["TextDataModule: 2 of 42 files are not UTF-8 text and were left out"]


def test_standard_library_without_its_tests() -> None:
    documents = read_documents(None)
    assert Path(json.__file__).read_bytes() in documents.values()
    assert Path(doctest.__file__).read_bytes() in documents.values()
    assert sum(map(len, documents.values())) > 5e6
    assert Path(pytest.__file__).read_bytes() not in documents.values()
    import idlelib.idle_test.test_query

    assert Path(idlelib.idle_test.test_query.__file__).read_bytes() not in documents.values()


def documents_of(number: int) -> dict[str, bytes]:
    return {f"{index:04d}": f"document {index}".encode() for index in range(number)}


def test_split_is_by_document() -> None:
    documents = documents_of(4000)
    train, validation, _ = split_documents(documents, 0.05, seed=0)
    assert train | validation == documents
    assert not train.keys() & validation.keys()
    assert abs(len(validation) - 200) < 5 * math.sqrt(4000 * 0.05 * 0.95)
    assert split_documents(documents, 0.05, seed=1)[1] != validation
    # another corpus with some of them: each stays on its side
    half = {key: value for key, value in documents.items() if int(key) % 2}
    assert split_documents(half, 0.05, seed=0)[1].keys() == validation.keys() & half.keys()


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_split_leaves_no_side_empty(val_fraction: float) -> None:
    for number in (2, 3, 10):
        train, validation, _ = split_documents(documents_of(number), val_fraction, seed=0)
        assert min(len(train), len(validation)) == 1
        assert len(train) + len(validation) == number


@pytest.mark.parametrize("number", [3, 10, 4000])
def test_a_test_split_takes_documents_from_training_alone(number: int) -> None:
    documents = documents_of(number)
    train, validation, test = split_documents(documents, 0.05, seed=0, test_fraction=0.1)
    assert train | validation | test == documents
    assert len(train) + len(validation) + len(test) == number
    assert min(len(train), len(validation), len(test)) > 0
    assert validation == split_documents(documents, 0.05, seed=0)[1]


def test_the_test_set_holds_documents_of_no_other_split(build: Build, tiny_corpus: Path) -> None:
    data, without = build(test_fraction=0.2, sequence_length=8), build(sequence_length=8)
    held_out = split_documents(read_documents(str(tiny_corpus)), 0.05, 0, 0.2)[2]
    expected = b"".join(text + bytes([0]) for text in held_out.values())
    tokens = data.test_set.tokens.ravel()
    assert bytes(0 if token == data.separator_id else token for token in tokens) == expected[: len(tokens)]
    assert len(expected) - len(tokens) < 8
    assert sum(len(batch["input_ids"]) for batch in data.test_dataloader()) == len(data.test_set)
    assert without.test_set is None
    assert np.array_equal(data.validation_set.tokens, without.validation_set.tokens)
    with pytest.raises(ValueError, match="test_fraction="):
        without.test_dataloader()
    with pytest.raises(ValueError, match=r"test_fraction=0\.96"):
        build(test_fraction=0.96)


def test_one_long_document_is_cut_at_line_ends() -> None:
    content = "".join(f"line {index}, {'x' * (index % 50)}\n" for index in range(3000)).encode()
    train, validation, _ = split_documents({"only": content}, 0.1, seed=0)
    pieces = [*train.values(), *validation.values()]
    assert 80 < len(pieces) <= 101
    assert all(piece.endswith(b"\n") and piece in content for piece in pieces)
    assert sum(map(len, pieces)) == len(content)


# ---- tokens


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_sequences_hold_the_documents(build: Build, tiny_corpus: Path, tokenizer: str) -> None:
    data = build(tokenizer=tokenizer, mask_rate=0, val_fraction=0.2)
    found: list[set[str]] = []
    for dataset in (data.train_set, data.validation_set):
        flat = dataset.tokens.ravel()
        ends = np.flatnonzero(flat == data.separator_id)
        found.append({data.decode(piece[piece != data.separator_id]) for piece in np.split(flat, ends)[:-1]})
    train, validation = found
    originals = texts_of(tiny_corpus)
    assert train | validation <= originals
    assert not train & validation
    # what does not fill the last sequence is left out: at most one document of each side here
    assert len(originals) - 2 <= len(train) + len(validation) <= len(originals)
    assert 2 <= len(validation) <= 16


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_decode_inverts_encode(build: Build, tokenizer: str) -> None:
    data = build(tokenizer=tokenizer)
    for sample in (
        "the N V",
        "",
        "\tdef f(x):\n\n    return '<mask> <sep>'\r\n",
        "na\u00efve \u65e5\u672c\u8a9e \U0001f600",
        "\0\x01",
    ):
        ids = data.encode(sample)
        assert data.decode(ids) == sample
        assert all(0 <= token < data.separator_id for token in ids)
    assert data.decode([*data.encode("a"), data.mask_id, *data.encode("b"), data.separator_id]) == "a<mask>b<sep>"


def test_bpe_merges_what_is_frequent(build: Build) -> None:
    data = build(tokenizer="bpe")
    assert data.vocab_size == 400
    assert len(data.encode(" the the the")) == 3
    used = int(max(data.train_set.tokens.max(), data.validation_set.tokens.max()))
    assert used == data.separator_id == 398
    assert len(data.train_set) < len(build().train_set) / 1.5


def test_bpe_knows_training_documents_only(build: Build, tiny_corpus: Path) -> None:
    held_out = split_documents(read_documents(str(tiny_corpus)), 0.05, seed=0)[1]
    before = build(tokenizer="bpe").state_dict()["settings"]["tokenizer"]
    for path in tiny_corpus.iterdir():
        if path.read_bytes() in held_out.values():
            path.unlink()
    documents = read_documents(str(tiny_corpus))
    assert cache.digest(corpus.train_bpe(documents.values(), 398).encode()) == Path(before.split()[1]).stem


def test_large_vocabularies_take_four_bytes(build: Build) -> None:
    assert build(tokenizer="bpe", vocab_size=70000).train_set.tokens.dtype == np.uint32
    assert build().train_set.tokens.dtype == np.uint16


# ---- batches


def test_batches_of_a_masked_model(build: Build) -> None:
    data = build()
    assert (data.vocab_size, data.separator_id, data.mask_id, data.num_predictions) == (258, 256, 257, 10)
    batches = all_batches(data.train_dataloader())
    assert len(batches) == len(data.train_set) // 8
    for batch in batches:
        assert {name: tuple(value.shape) for name, value in batch.items()} == {
            "input_ids": (8, 64),
            "positions": (8, 10),
            "labels": (8, 10),
        }
        assert {value.dtype for value in batch.values()} == {torch.int64}
    # with the labels put back, the sequences are those of the file, each at most once
    restored = torch.cat([batch["input_ids"].scatter(1, batch["positions"], batch["labels"]) for batch in batches])
    rows = Counter(map(tuple, data.train_set.tokens.tolist()))
    seen = Counter(map(tuple, restored.tolist()))
    assert seen <= rows


def test_batches_of_a_causal_model(build: Build) -> None:
    data = build(mask_rate=0)
    assert data.num_predictions == 0
    batch = next(iter(data.val_dataloader()))
    assert list(batch) == ["input_ids"]
    assert batch["input_ids"].tolist() == data.validation_set.tokens[:8].tolist()


def test_training_changes_with_the_epoch_and_validation_does_not(build: Build) -> None:
    data = build()
    train, validation = data.train_dataloader(), data.val_dataloader()
    assert same(all_batches(validation), all_batches(validation))
    one, two = ({batch["input_ids"][0].sum().item() for batch in train} for _ in range(2))
    assert one != two
    by_row = []
    for epoch in (0, 1):  # the same sequence, masked anew
        batch = data.train_set.__getitems__([(epoch, 3), (epoch, 5)])
        by_row.append(batch["positions"])
        assert torch.equal(data.train_set[epoch, 5]["positions"], batch["positions"][1])
    assert not torch.equal(*by_row)


@pytest.mark.parametrize("mask_rate", [0.15, 0.0])
def test_a_batch_across_the_end_of_an_epoch_is_that_of_its_two_parts(build: Build, mask_rate: float) -> None:
    sequences = build(mask_rate=mask_rate).train_set
    keys = [(0, 3, None), (0, 1, None), (1, 1, None), (1, 0, None), (1, 4, None)]
    whole, parts = sequences.__getitems__(keys), [sequences.__getitems__(own) for own in (keys[:2], keys[2:])]
    assert same([whole], [{name: torch.cat([part[name] for part in parts]) for name in whole}])
    if mask_rate:
        assert not torch.equal(whole["positions"][1], whole["positions"][2])  # one sequence, in two epochs


def test_workers_make_the_same_batches(build: Build) -> None:
    alone, helped = build(), build(num_workers=2)
    for epoch_of in (TextDataModule.train_dataloader, TextDataModule.val_dataloader):
        one, two = epoch_of(alone), epoch_of(helped)
        assert same(all_batches(one) + all_batches(one), all_batches(two) + all_batches(two))


def test_workers_that_are_not_forked_map_the_file(build: Build) -> None:
    data = build(max_val_sequences=10)
    for dataset in (data.train_set, data.validation_set):
        sent = pickle.dumps(dataset)
        assert len(sent) < 2000
        assert same([pickle.loads(sent).__getitems__([0, 3])], [dataset.__getitems__([0, 3])])


def test_validation_on_a_fixed_part(build: Build) -> None:
    whole, part = build(val_fraction=0.3, max_val_sequences=None), build(val_fraction=0.3, max_val_sequences=20)
    again = build(val_fraction=0.3, max_val_sequences=20, batch_size=20)
    (batch,) = all_batches(again.val_dataloader())
    assert torch.equal(batch["labels"], torch.cat([b["labels"] for b in part.val_dataloader()]))
    # the same masks as when all are used
    rows = {tuple(row) for b in whole.val_dataloader() for row in b["input_ids"].tolist()}
    assert len(whole.validation_set) > 100
    assert {tuple(row) for row in batch["input_ids"].tolist()} < rows


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_unigram_entropy(build: Build, tokenizer: str) -> None:
    data = build(tokenizer=tokenizer, val_fraction=0.3, max_val_sequences=50)
    assert data.validation_set.rows is not None
    ordinary = range(data.vocab_size - 2)
    train = Counter(token for row in data.train_set.tokens.tolist() for token in row)
    held_out = [token for row in data.validation_set.rows for token in data.validation_set.tokens[row].tolist()]
    held_out = [token for token in held_out if token in ordinary]
    total = sum(train[token] + 1 for token in ordinary)
    expected = -sum(math.log((train[token] + 1) / total) for token in held_out) / len(held_out)
    assert data.unigram_entropy == pytest.approx(expected, rel=1e-9)


# ---- cache


def files_in(cache: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (cache / "text").iterdir()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_cache_is_used(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str) -> None:
    first = build(tokenizer=tokenizer)
    written = files_in(tmp_path / "cache")

    def never(*_: Any) -> Any:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(TextDataModule, "_tokenize", never)
    monkeypatch.setattr(cache, "_write_atomically", never)
    # neither of these has a say in what is tokenized
    second = build(tokenizer=tokenizer, sequence_length=32, mask_rate=0.3, num_workers=1)
    assert files_in(tmp_path / "cache") == written
    assert second.train_set.path == first.train_set.path
    assert isinstance(second.train_set.tokens, np.memmap)


def test_cache_goes_by_content(build: Build, tiny_corpus: Path) -> None:
    first = build().train_set.path
    for path in list(tiny_corpus.iterdir()):  # other names and times, one of them twice
        path.rename(tiny_corpus / f"other-{path.name}")
    (tiny_corpus / "twice.txt").write_text((tiny_corpus / "other-00.txt").read_text())
    assert build().train_set.path == first
    assert build(seed=1).train_set.path == first
    assert build(split_seed=1).train_set.path != first
    assert build(val_fraction=0.3).train_set.path != first
    with open(tiny_corpus / "other-00.txt", "a") as file:
        file.write("!")
    changed = build()
    assert changed.train_set.path != first or "!" in changed.decode(changed.validation_set.tokens.ravel())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
def test_damaged_cache_is_built_again(build: Build, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    build(tokenizer="bpe")
    whole = {name: content for name, (content, _) in files_in(tmp_path / "cache").items()}
    assert len(whole) == 4
    for name in whole:
        damage(tmp_path / "cache" / "text" / name)
        build(tokenizer="bpe")
        assert {name: content for name, (content, _) in files_in(tmp_path / "cache").items()} == whole


@pytest.mark.parametrize("index", ["[]", "3", '{"train": 3}', "{}", '{"train": "x"}'])
def test_foreign_index_is_built_again(build: Build, tmp_path: Path, index: str) -> None:
    path = build().train_set.path
    (cached,) = (tmp_path / "cache" / "text").glob("*.json")
    cached.write_text(index)
    assert build().train_set.path == path


@pytest.mark.slow
def test_two_processes_at_the_same_time(run_python: RunPython, tiny_corpus: Path, tmp_path: Path) -> None:
    script = """
        import os, sys
        from lit_scale.datamodules import TextDataModule
        corpus, cache = sys.argv[1:]
        gate, open_it = os.pipe()
        children = []
        for _ in range(2):
            if not (child := os.fork()):
                os.read(gate, 1)  # both wait until there is something for each
                for repeat in range(8):
                    data = TextDataModule(corpus, "bpe", 300 + repeat, cache_dir=cache)
                    data.prepare_data()
                    data.setup("fit")
                    assert data.train_set.tokens.max() == 298 + repeat
                os._exit(0)
            children.append(child)
        os.write(open_it, b"go")
        sys.exit(any(os.waitpid(child, 0)[1] for child in children))
    """
    assert run_python(script, tiny_corpus, tmp_path / "cache").returncode == 0
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 16  # an index and a tokenizer each


def test_cache_folder_from_the_environment(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere") in build(cache_dir=None).train_set.path.parents


def test_cache_folder_that_cannot_be_written(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cache_dir='.*/file/cache' cannot be written .*: pass cache_dir="):
        build(cache_dir=str(tmp_path / "file" / "cache"))


def test_full_disk(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cache_dir='.*/cache' cannot be written .*No space left"):
        build()
    assert not list((tmp_path / "cache" / "text").iterdir())


def test_standard_library_is_fast(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.process_time()  # so that other work on the machine does not count
        data = TextDataModule(cache_dir=str(tmp_path))
        data.prepare_data()
        data.setup("fit")
        seconds.append(time.process_time() - start)
    assert seconds[0] < 10
    assert min(seconds[1:]) < 1
    assert 2 < data.unigram_entropy < 4  # nats per byte
    assert len(data.validation_set) == 2048


@pytest.mark.slow
def test_bpe_of_the_standard_library_is_fast(tmp_path: Path) -> None:
    start = time.process_time()  # of all threads, so that other work on the machine does not count
    data = TextDataModule(tokenizer="bpe", cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert time.process_time() - start < 20
    for path in (Path(json.__file__), Path(doctest.__file__)):
        assert data.decode(data.encode(path.read_text())) == path.read_text()
    assert len(data.encode(Path(doctest.__file__).read_text())) < path.stat().st_size / 3


# ---- under a Trainer

quiet_trainer = functools.partial(support.quiet_trainer, num_sanity_val_steps=2)


@pytest.fixture
def checkpoint(build: Build, tmp_path: Path) -> Callable[..., Path]:
    def make(steps: int, **settings: Any) -> Path:
        trainer = quiet_trainer(max_steps=steps)
        trainer.fit(Reader(), build(setup=False, **settings))
        path = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(path)
        return path

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly(build: Build, checkpoint: Callable[..., Path], workers: int) -> None:
    def new() -> TextDataModule:
        return build(setup=False, batch_size=64, sequence_length=128, num_workers=workers)

    full = Reader()
    quiet_trainer(max_steps=10).fit(full, new())
    loader: Any = full.trainer.train_dataloader
    per_epoch = len(loader)
    assert per_epoch < 8
    for steps in (2, per_epoch, per_epoch + 1):
        path = checkpoint(steps, batch_size=64, sequence_length=128)
        assert torch.load(path, weights_only=True)["TextDataModule"]["position"]["length"] == per_epoch
        resumed = Reader()
        quiet_trainer(max_steps=10).fit(resumed, new(), ckpt_path=path)
        assert same(resumed.seen, full.seen[steps:])


def test_resumes_epochs_of_limited_length(build: Build, tmp_path: Path) -> None:
    """Lightning drops the state of the loader here, see `FitLoop.restarting`."""

    class SaveAtEpochEnd(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    full = Reader()
    quiet_trainer(max_epochs=3, limit_train_batches=4, callbacks=[SaveAtEpochEnd()]).fit(full, build(setup=False))
    assert len(full.seen) == 12
    for epoch in (0, 1):
        resumed = Reader()
        quiet_trainer(max_epochs=3, limit_train_batches=4).fit(
            resumed, build(setup=False), ckpt_path=tmp_path / f"{epoch}.ckpt"
        )
        assert same(resumed.seen, full.seen[4 * epoch + 4 :])


def test_overfitting_takes_the_first_batches(build: Build) -> None:
    seen = Reader()
    data = build(setup=False)
    with pytest.warns(UserWarning, match="overfit"):
        quiet_trainer(max_epochs=2, overfit_batches=2).fit(seen, data)
    expected = [data.train_set.__getitems__(range(8 * number, 8 * number + 8)) for number in (0, 1)]
    assert same(seen.seen, expected * 2)


def test_another_trainer_starts_afresh(build: Build) -> None:
    data, runs = build(setup=False), []
    for _ in range(2):
        runs.append(Reader())
        quiet_trainer(max_steps=5).fit(runs[-1], data)
    assert same(runs[0].seen, runs[1].seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
        ({"sequence_length": 32}, r"sequence_length \(was 64, is 32\)"),
        ({"batch_size": 4}, r"batch_size \(was 8, is 4\)"),
        ({"mask_rate": 0.3}, r"mask_rate \(was 0.15, is 0.3\)"),
        ({"tokenizer": "bpe"}, r"tokenizer \(was 'bytes', is 'bpe .*'\), vocab_size \(was 258, is 400\)"),
        ({"corpus": "more"}, r"corpus \(was '.*', is '.*'\)"),
    ],
)
def test_resume_on_other_data_is_refused(
    build: Build,
    checkpoint: Callable[..., Path],
    tiny_corpus: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    path = checkpoint(2)
    if "corpus" in change:
        (tmp_path / "more.txt").write_text("one more")
        change = {"corpus": [str(tiny_corpus), str(tmp_path / "more.txt")]}
    with pytest.raises(ValueError, match=f"the checkpoint was trained on other data.*{message}"):
        quiet_trainer(max_steps=4).fit(Reader(), build(setup=False, **change), ckpt_path=path)
    # but it can be evaluated there
    quiet_trainer().validate(Reader(), build(setup=False, **change), ckpt_path=path, verbose=False)


def test_state_can_come_before_setup(build: Build) -> None:
    state = build().state_dict()
    assert build(setup=False).state_dict() == {}
    same, other = build(setup=False), build(setup=False, seed=1)
    for data in (same, other):
        data.load_state_dict(state)
    same.setup("fit")
    with pytest.raises(ValueError, match="seed"):
        other.setup("fit")


def test_command_line(tiny_corpus: Path) -> None:
    arguments = [
        f"--data.corpus=[{tiny_corpus}]",
        "--data.tokenizer=bpe",
        "--data.vocab_size=300",
        "--data.max_val_sequences=null",
    ]
    cli = LightningCLI(Reader, TextDataModule, run=False, save_config_callback=None, args=arguments)
    assert cli.datamodule.corpus == [str(tiny_corpus)]
    assert (cli.datamodule.vocab_size, cli.datamodule.max_val_sequences) == (300, None)


# ---- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 7}, "sequence_length=7: must be at least 8"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"max_val_sequences": 0}, "max_val_sequences=0: must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1: must be at least 0"),
        ({"mask_rate": 1.0}, "mask_rate=1.0: must be at least 0"),
        ({"mask_rate": -0.1}, "mask_rate=-0.1: must be at least 0"),
        ({"mask_rate": float("nan")}, "mask_rate=nan: must be at least 0"),
        ({"val_fraction": 0.0}, "val_fraction=0.0: must lie between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: must lie between 0 and 1"),
        ({"tokenizer": "words"}, "tokenizer='words': must be 'bytes' or 'bpe'"),
        ({"vocab_size": 300}, "vocab_size=300 with tokenizer='bytes'"),
        ({"tokenizer": "bpe", "vocab_size": 257}, "vocab_size=257: must be at least 258"),
        ({"tokenizer": "bpe", "vocab_size": 0}, "vocab_size=0: must be at least 258"),
    ],
)
def test_argument_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(**settings)


@pytest.mark.parametrize("corpus", ["missing.txt", "missing/*.txt", ""])
def test_corpus_that_matches_nothing(build: Build, tiny_corpus: Path, corpus: str) -> None:
    for given in (corpus, [str(tiny_corpus), corpus]):
        with pytest.raises(ValueError, match=f"corpus='{corpus.replace('*', '.')}' matches no file"):
            build(corpus=given)


@pytest.mark.parametrize("content", [b"text\0", b"\xff\xfe", b"\xe9t\xe9"])
def test_named_file_that_is_not_text(build: Build, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"corpus='.*data.bin' is not text"):
        build(corpus=str(tmp_path / "data.bin"))


def test_corpus_without_text(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    for number in (0, 1):
        with pytest.raises(ValueError, match=rf"holds no text \(0 bytes in {number} text files\)"):
            build(corpus=str(folder))
        (folder / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"corpus=\[\] holds no text"):
        build(corpus=[])


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("x", {}, "2 tokens for training make 0 sequences of sequence_length=64, but at least 8 are needed"),
        ("line\n" * 200, {}, "tokens for training make [0-9] sequences of .* (512 tokens): give more text"),
        ("".join(f"line {i}\n" for i in range(400)), {"val_fraction": 1e-9}, "tokens for validation make 0 sequences"),
    ],
)
def test_corpus_too_short(build: Build, tmp_path: Path, content: str, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "short.txt").write_text(content)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        build(corpus=str(tmp_path / "short.txt"), **settings)


def test_decode_before_there_is_a_tokenizer(build: Build) -> None:
    with pytest.raises(ValueError, match="call prepare_data"):
        build(setup=False, tokenizer="bpe").encode("x")


@pytest.mark.parametrize("module", [loader, masking, text])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_seeds_share_validation_data_but_not_training_order(build: Build) -> None:
    one, other = build(seed=1), build(seed=2)
    for a, b in zip(one.val_dataloader(), other.val_dataloader(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    batches = [next(iter(data.train_dataloader())) for data in (one, other)]
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
