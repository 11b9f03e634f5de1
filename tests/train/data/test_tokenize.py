"""Files become the same tokens whoever makes them and however often they are interrupted, and nothing is lost."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from qwen2_jax.command import parse
from qwen2_jax.tokenizer import Tokenizer
from train.data.encode import Encoding, tokenizer_digest
from train.data.source import open_store
from train.data.store import TokenStore
from train.data.tokenize import tokenize
from train.data.tokenize_job import Options, run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def sources(tmp_path):
    """Two files of 30 lines each, and a text."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("a", "b"):
        lines = (json.dumps({"text": f"{name}{n} " * (n % 7 + 1)}) for n in range(30))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "c.txt").write_text("a whole file")
    return folder


def texts(folder):
    lines = [line for name in ("a", "b") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines] + ["a whole file"]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_documents_come_back(sources, tmp_path, how, tokenizer_folder):
    done = tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300)
    store = TokenStore(tmp_path / "dst")
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    expected = texts(sources)
    assert [tokenizer.decode(tokens[:-1]) for tokens in store] == expected
    assert all(tokens[-1] == tokenizer.backend.token_to_id("<|endoftext|>") for tokens in store)
    assert (done.documents, done.tokens) == (len(store), store.tokens) == (61, sum(len(t) + 1 for t in expected))
    assert store.lengths(np.array([60, 0])).tolist() == [13, len(expected[0]) + 1]
    assert store.read(60, 2, 3).tolist() == store[60][2:5].tolist() and store[60].dtype == np.int32
    assert store.damages() == []


def test_real_tokenizer(tmp_path, qwen_files):
    """Qwen's own, which has more ids than 16 bits."""
    (tmp_path / "a.txt").write_text("Qwen2 は<|endoftext|>良い")
    tokenize([str(tmp_path / "a.txt")], tmp_path / "dst", Encoding(str(qwen_files)), workers=0)
    store = TokenStore(tmp_path / "dst")
    tokenizer = Tokenizer.from_folder(qwen_files)
    assert store.manifest["dtype"] == "<u4"
    assert store[0].tolist() == [*tokenizer.encode("Qwen2 は<|endoftext|>良い", control_tokens=False), 151643]


def test_control_tokens_by_request(tmp_path, how):
    (tmp_path / "a.txt").write_text("a<|endoftext|>")
    last = Tokenizer.from_folder(how.tokenizer).backend.token_to_id("b")
    for allowed, expected in ((False, 15), (True, 3)):
        folder = tmp_path / str(allowed)
        tokenize([str(tmp_path / "a.txt")], folder, how._replace(control_tokens=allowed, end="b"), workers=0)
        tokens = TokenStore(folder)[0]
        assert len(tokens) == expected and tokens[-1] == last


def test_either_form_of_a_tokenizer_is_the_same(tmp_path, qwen_files):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qwen_files / name).read_bytes())
    digest = [tokenizer_digest(Tokenizer.from_folder(folder)) for folder in (tmp_path, qwen_files)]
    assert digest[0] == digest[1]


def test_grain_takes_a_store(store):
    """It is a random-access source of Grain's."""
    shuffled = grain.MapDataset.source(store).shuffle(seed=3)
    assert sorted(map(bytes, shuffled)) == sorted(map(bytes, store))


def test_processes_make_the_same_bytes(sources, tmp_path, how):
    for workers in (0, 1, 2):
        tokenize([str(sources)], tmp_path / f"dst{workers}", how, workers=workers, part_size=300)
    assert digests(tmp_path / "dst0") == digests(tmp_path / "dst1") == digests(tmp_path / "dst2")
    assert not list(tmp_path.glob("*.partial"))


def test_workers_do_not_import_jax():
    code = "import sys, train.data.worker; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_manifest_tells_all(sources, tmp_path, how):
    with (sources / "a.jsonl").open("a") as file:
        file.write('{"text": ""}\nbroken\n')
    tokenize([str(sources)], tmp_path / "dst", how, workers=0)
    manifest = json.loads((tmp_path / "dst" / "manifest.json").read_text())
    counts = {key: manifest[key] for key in ("documents", "records", "empty", "bad", "dtype")}
    assert counts == {"documents": 61, "records": 63, "empty": 1, "bad": 1, "dtype": "<u2"}
    assert manifest["bad_records"][0].startswith(f"{sources}/a.jsonl, line 32: not JSON")
    assert manifest["task"]["sources"][f"{sources}/c.txt"]["size"] == 12
    for file in manifest["files"]:
        assert digests(tmp_path / "dst")[file["name"]] == file["sha256"]
    assert {"manifest.json", "offsets.bin"} < {*digests(tmp_path / "dst")}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_records_stop(sources, tmp_path, how, workers):
    for name in ("a", "b"):
        with (sources / f"{name}.jsonl").open("a") as file:
            file.write("broken\n" * 2)
    with pytest.raises(ValueError, match=r"bad records, more than the 3 .*\.jsonl, line 3[12]: not JSON"):
        tokenize([str(sources)], tmp_path / "dst", how, workers=workers, part_size=300, max_bad_records=3)
    assert not (tmp_path / "dst").exists()
    with pytest.raises(ValueError, match=r"bad records, more than the 3 "):  # those of finished parts count
        tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300, max_bad_records=3)
    done = tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300, max_bad_records=4)
    assert done.resumed_parts > 0 and done.bad_records == 4 and done.documents == 61


def test_finished_work_is_recognized(sources, tmp_path, how):
    tokenize([str(sources)], tmp_path / "dst", how, workers=0)
    before = {path.name: path.stat() for path in (tmp_path / "dst").iterdir()}
    assert tokenize([str(sources)], tmp_path / "dst", how, workers=0).already_complete
    assert {path.name: path.stat() for path in (tmp_path / "dst").iterdir()} == before
    with pytest.raises(ValueError, match="made differently \\(field: 'text' then, 'id' now\\)"):
        tokenize([str(sources)], tmp_path / "dst", how._replace(field="id"), workers=0)


def test_nothing_is_overwritten(sources, tmp_path, how):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already, and is no folder of tokens"):
        tokenize([str(sources)], tmp_path / "dst", how, workers=0)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in the way"):
        tokenize([str(sources)], tmp_path / "other", how, workers=0)
    assert (tmp_path / "dst" / "thesis.txt").exists() and (tmp_path / "other.partial" / "thesis.txt").exists()


def test_only_the_same_work_is_resumed(sources, tmp_path, how):
    (sources / "b.jsonl").write_text("broken\n")
    with pytest.raises(ValueError, match="more than the 0"):
        tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300, max_bad_records=0)
    assert list((tmp_path / "dst.partial" / "parts").glob("*.json"))
    with pytest.raises(ValueError, match="unfinished work on something else"):
        tokenize([str(sources)], tmp_path / "dst", how._replace(field="body"), workers=0, part_size=300)
    with pytest.raises(ValueError, match=r"unfinished work on something else \(.*c.txt' is gone\)"):
        tokenize([str(sources / "*.jsonl")], tmp_path / "dst", how, workers=0, part_size=300)
    assert tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300).resumed_parts > 0


def test_nothing_is_left_of_work_that_finished_nothing(sources, tmp_path, how):
    with pytest.raises(ValueError, match=r"no field 'body', only \['text'\]"):
        tokenize([str(sources / "a.jsonl")], tmp_path / "dst", how._replace(field="body"), workers=0, max_bad_records=9)
    assert not list(tmp_path.glob("dst*"))
    assert tokenize([str(sources)], tmp_path / "dst", how, workers=0).documents == 61


@pytest.mark.parametrize(
    "change",
    [{"bad": "one"}, {"named": [[1]]}, {"sha256": None}, {"tokens": 1.5}, {"lengths_sha256": "0"}, "lengths"],
    ids=str,
)
def test_a_part_that_is_not_whole_is_made_again(change, sources, tmp_path, how):
    """Where documents begin is vouched for by nobody else."""
    tokenize([str(sources)], tmp_path / "whole", how, workers=0, part_size=300)
    (sources / "zz.jsonl").write_text("broken\n")
    with pytest.raises(ValueError, match="more than the 0"):
        tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300, max_bad_records=0)
    receipt, lengths = (tmp_path / "dst.partial/parts" / f"000000.{kind}" for kind in ("json", "lengths"))
    if change == "lengths":
        content = bytearray(lengths.read_bytes())
        content[0] ^= 1
        lengths.write_bytes(content)
    else:
        receipt.write_text(json.dumps(json.loads(receipt.read_text()) | change))
    tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300)
    assert TokenStore(tmp_path / "dst").digest == TokenStore(tmp_path / "whole").digest


def test_nothing_is_written_among_the_sources(sources, tmp_path, how):
    with pytest.raises(ValueError, match="lies in .*, all of which is read"):
        tokenize([str(sources)], sources / "dst", how, workers=0)
    assert not list(sources.glob("dst*"))
    tokenize([str(sources / "*.jsonl")], sources / "dst", how, workers=0)  # a glob names none of it


def test_two_processes_do_not_meet(sources, tmp_path, how):
    work = tmp_path / "dst.partial"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing"):
            tokenize([str(sources)], tmp_path / "dst", how, workers=0)
        late = threading.Thread(target=tokenize, args=([str(sources)], tmp_path / "dst", how), kwargs={"wait": True})
        late.start()
        late.join(0.2)
        assert late.is_alive()
    late.join()
    assert TokenStore(tmp_path / "dst").tokens


def test_sources_that_change_meanwhile(sources, tmp_path, how):
    def touch(done, total):
        os.utime(sources / "a.jsonl", ns=(1, 1))

    with pytest.raises(ValueError, match=r"a.jsonl changed while it was read"):
        tokenize([str(sources)], tmp_path / "dst", how, workers=0, progress=touch)
    assert not (tmp_path / "dst").exists()


def test_progress_reaches_the_end(sources, tmp_path, how):
    seen = []
    tokenize([str(sources)], tmp_path / "dst", how, workers=0, part_size=300, progress=lambda *now: seen.append(now))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_bad_input(sources, tmp_path, how):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    cases = [
        (["missing"], how, "does not exist"),
        ([str(tmp_path / "empty.jsonl")], how, "there are no documents in 2 records"),
        ([str(sources)], how._replace(tokenizer="missing"), "no folder with a tokenizer"),
        ([str(sources)], how._replace(end="<eod>"), "has no token '<eod>'|has no token <eod>"),
        ([str(sources)], how._replace(end=""), "has no token ''"),
    ]
    for paths, wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            tokenize(paths, tmp_path / "dst", wrong, workers=0)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        tokenize([str(sources)], tmp_path / "dst", how._replace(tokenizer=str(sources)), workers=0)
    assert not list(tmp_path.glob("dst*"))


def test_a_process_that_dies_is_named(sources, tmp_path, how, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ValueError, match=r"the process that read .*a.jsonl ended with status 1"):
        tokenize([str(sources / "a.jsonl")], tmp_path / "dst", how, workers=1)


def test_damaged_stores(sources, tmp_path, how):
    tokenize([str(sources)], tmp_path / "dst", how, workers=0)
    tokens = tmp_path / "dst" / "tokens-000000.bin"
    content = bytearray(tokens.read_bytes())
    content[40] ^= 1
    tokens.write_bytes(content)
    assert TokenStore(tmp_path / "dst").damages() == [str(tokens)]
    assert sorted(len(TokenStore(tmp_path / "dst").damages(share, 3)) for share in range(3)) == [0, 0, 1]
    offsets = tmp_path / "dst" / "offsets.bin"
    ends = offsets.read_bytes()
    offsets.write_bytes(ends[:-8] + (1).to_bytes(8, "little"))
    with pytest.raises(ValueError, match=r"offsets.bin is damaged: it does not end with the tokens"):
        TokenStore(tmp_path / "dst")
    offsets.write_bytes(ends)
    tokens.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"tokens-000000.bin is damaged: it has \d+ bytes, expected"):
        TokenStore(tmp_path / "dst")
    manifest = json.loads((tmp_path / "dst" / "manifest.json").read_text())
    for change, message in (
        ({"version": 9}, "of version 9"),
        ({"files": []}, "damaged"),
        ({"dtype": "<f4"}, "damaged"),
        ({"files": manifest["files"] * 2, "tokens": 2 * manifest["tokens"]}, "damaged"),
        ({"files": [{**manifest["files"][0], "tokens": float("inf")}]}, "damaged"),
        ({"documents": float(manifest["documents"])}, "damaged"),
        ({"digest": "zz"}, "damaged"),
        ({"bad_records": None}, "damaged"),
        ({"task": None}, "damaged"),
    ):
        (tmp_path / "dst" / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            TokenStore(tmp_path / "dst")
        with pytest.raises(ValueError, match=message):
            tokenize([str(sources)], tmp_path / "dst", how, workers=0)
    with pytest.raises(ValueError, match="is no folder of tokens"):
        TokenStore(sources)


def test_open_store_tokenizes_once(sources, tmp_path, how, tokenizer_folder):
    cache = tmp_path / "cache"
    first = open_store([str(sources)], how, cache, workers=0)
    assert open_store([str(sources)], how, cache, workers=0).folder == first.folder
    assert open_store([str(first.folder)], how, cache).digest == first.digest
    other = open_store([str(sources / "a.jsonl")], how, cache, workers=0)
    assert other.folder != first.folder and len(list(cache.iterdir())) == 2
    with pytest.raises(ValueError, match="make it a source of its own"):
        open_store([str(first.folder), str(sources)], how, cache)


def test_open_store_knows_the_tokenizer(sources, tmp_path, how, qwen_files):
    tokenize([str(sources)], tmp_path / "dst", how, workers=0)
    with pytest.raises(ValueError, match="holds tokens of another tokenizer"):
        open_store([str(tmp_path / "dst")], Encoding(str(qwen_files)), tmp_path / "cache")


def job(*argv, **changes):
    return run(dataclasses.replace(parse(Options, list(map(str, argv)), "tokenize"), **changes))


def test_job_reports(sources, tmp_path, tokenizer_folder, capsys):
    (sources / "a.jsonl").write_text('{"text": "x"}\n{"text": ""}\nbroken\n')
    (tmp_path / "more.txt").write_text("more")
    for name in ("table.csv", "notes.json", "LICENSE"):
        (sources / name).write_text("not read")
    arguments = sources, tmp_path / "more.txt", tmp_path / "dst", "--tokenizer", tokenizer_folder
    assert job(*arguments, "--workers", "1") == 0
    printed = capsys.readouterr()
    assert "dst: 33 documents, " in printed.out and "1 bad records skipped" in printed.out
    assert "warning: skipped" in printed.err and "a.jsonl, line 3: not JSON" in printed.err
    assert "(1 without a suffix, 1 .csv, 1 .json); `train tokenize --kind` says" in printed.err
    assert "does not split" not in printed.err
    assert job(*arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["already_complete"] is True and report["left_out"] == {".csv": 1, ".json": 1, "": 1}
    for wrong in ({"workers": 0}, {"max_bad_records": -1}, {"paths": ("dst",)}):
        with pytest.raises(ValueError, match="must|is missing"):
            job(*arguments, **wrong)


def test_job_takes_a_tokenizer_of_the_hub(sources, tmp_path, tokenizer_folder, monkeypatch):
    asked = []
    monkeypatch.setattr("convert.folder._downloaded", lambda *name: asked.append(name) or tokenizer_folder)
    assert job(sources, tmp_path / "dst", "--tokenizer", "Qwen/Qwen2-0.5B", "--workers", "1") == 0
    assert asked == [("Qwen/Qwen2-0.5B", "none")] and len(TokenStore(tmp_path / "dst"))
    with pytest.raises(ValueError, match="there is no folder qwen2-0.5b; for a model of the Hugging Face hub write"):
        job(sources, tmp_path / "other", "--tokenizer", "qwen2-0.5b")


def test_control_c_leaves_the_terminal_as_it_was(tmp_path, tokenizer_folder):
    (tmp_path / "long.jsonl").write_text('{"text": "again "}\n' * 400_000)
    arguments = [tmp_path / "long.jsonl", tmp_path / "dst", "--tokenizer", tokenizer_folder, "--workers", "1"]
    command = [sys.executable, "-m", "qwen2_jax", "train", "tokenize", *map(str, arguments)]
    ours, theirs = pty.openpty()
    terminal = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody has it open any more
            while new := os.read(ours, 4096):
                if b"tokenizing" in new and b"tokenizing" not in seen:
                    process.send_signal(signal.SIGINT)
                seen += new
    os.close(ours)
    assert process.returncode == -signal.SIGINT, seen.decode()
    assert b"tokenizing" in seen and b"Traceback" not in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor is hidden"
    assert [path.name for path in tmp_path.iterdir()] == ["long.jsonl"], "what had not begun is put away"


COMMAND = """
import sys
from pathlib import Path
from train.data.encode import Encoding
from train.data.tokenize import tokenize
tokenize([sys.argv[1]], Path(sys.argv[2]), Encoding(sys.argv[3]), workers=2, part_size=16000)
"""


def command(sources, destination, tokenizer_folder):
    return [sys.executable, "-c", COMMAND, str(sources), str(destination), str(tokenizer_folder)]


def kill_behind(parts, sources, destination, tokenizer_folder):
    """Runs the job and kills it, with its workers' parent, once so many parts are finished; False if it got through."""
    process = subprocess.Popen(command(sources, destination, tokenizer_folder), cwd=ROOT)
    while process.poll() is None and len(finished(destination)) < parts:
        time.sleep(0.001)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def finished(destination):
    return list(Path(f"{destination}.partial").glob("parts/*.json"))


def check_resume(tmp_path, how, tokenizer_folder, seeds):
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in range(4):
        lines = (json.dumps({"text": f"{name} {n} " * 40}) for n in range(1600))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    subprocess.run(command(folder, tmp_path / "undisturbed", tokenizer_folder), cwd=ROOT, check=True)
    whole = sum(file.stat().st_size for file in folder.iterdir()) // 16000
    killed = resumed = 0
    for seed in seeds:
        destination, kept, dice = tmp_path / f"dst{seed}", 0, random.Random(seed)
        for _ in range(3):
            killed += kill_behind(dice.randrange(whole), folder, destination, tokenizer_folder)
            if destination.exists():
                break
            before, kept = kept, len(finished(destination))
            assert kept >= before, "finished parts were lost"
        resumed += kept > 0
        tokenize([str(folder)], destination, how, workers=0, part_size=16000)
        assert digests(destination) == digests(tmp_path / "undisturbed")
        assert not list(tmp_path.glob("*.partial"))
    assert killed and resumed, "no kill met work that had begun"


def test_resume_after_a_kill(tmp_path, how, tokenizer_folder):
    check_resume(tmp_path, how, tokenizer_folder, [0])


@pytest.mark.slow
def test_resume_after_many_kills(tmp_path, how, tokenizer_folder):
    check_resume(tmp_path, how, tokenizer_folder, range(1, 11))
