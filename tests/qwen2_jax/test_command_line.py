"""`qwen2-jax generate` and `chat` as a user meets them: output, exit status, and one clear line for every mistake."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from convert import save_checkpoint
from qwen2_jax import Qwen2, Qwen2Config, generate
from qwen2_jax.cli import JOBS, main
from qwen2_jax.commands.chat import Chat
from qwen2_jax.commands.session import Session, SessionOptions
from qwen2_jax.tokenizer import Tokenizer
from tests.oracles.published import INSTRUCT
from tests.processes import run_processes

CONFIG = Qwen2Config(
    vocab_size=151936,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    initializer_range=0.4,
    tie_word_embeddings=True,
)
PROMPTS = ["What is the capital of France?", "你好，世界", "def add(a, b):"]


@pytest.fixture(scope="module")
def params():
    return meta.unbox(Qwen2(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])


@pytest.fixture(scope="module")
def model(params, qwen_files, tmp_path_factory):
    """The folder of a small random model with the real tokenizer, greedy by its generation_config.json."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save_checkpoint(folder, CONFIG, params, tokenizer_from=qwen_files)
    (folder / "generation_config.json").write_text(json.dumps(INSTRUCT | {"do_sample": False}))
    return folder


@pytest.fixture
def type_in(monkeypatch):
    """Gives the command its standard input."""

    def type_in(text: str | bytes) -> None:
        content = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return type_in


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process: exit status, standard output, standard error."""
    # It is too late to join others, since JAX is running here.
    monkeypatch.setattr("qwen2_jax.commands.generate.join", lambda options: True)

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


def fails(result: tuple[int, str, str], *complaints: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("qwen2-jax: error: ") and err.count("\n") == 1, err
    for complaint in complaints:
        assert complaint in err


# Every command


def test_help_version_and_unknown_jobs(run):
    code, out, _ = run("--help")
    assert code == 0 and all(job in out for job in JOBS)
    assert run()[:2] == (0, out)
    assert run("--version")[1].startswith("qwen2-jax 0.")
    fails(run("generat"), "did you mean generate?")
    fails(run("brew"), "generate or chat or convert")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["generate", "--help"], ["chat", "--help"]])
def test_help_does_not_wait_for_jax(argv):
    script = "import sys; from qwen2_jax.cli import main\ntry: main(sys.argv[1:])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("job", ["generate", "chat"])
def test_options_are_explained_and_checked(job, run):
    with pytest.raises(SystemExit, match="0"):
        run(job, "--help")
    fails(run(job), "--model")
    fails(run(job, "--model", "x", "--temprature", "1"), "--temprature", "perhaps you meant --temperature")
    fails(run(job, "--model", "x", "--temperature", "hot"), "--temperature", "hot")
    fails(run(job, "--model", "x", "--dtype", "int4"), "int4", "bfloat16")


def test_the_option_that_is_refused_is_no_suggestion(run):
    """Another job of the command may have it."""
    result = run("evaluate", "lm-eval", "--model", "x", "--tasks", "y", "--data-dir", "z")
    fails(result, "Unrecognized", "--data-dir")
    assert "perhaps you meant" not in result[2]


# generate


def test_generate_prints_what_generate_returns(run, model, params):
    tokenizer = Tokenizer.from_folder(model)
    expected = generate(CONFIG, params, [tokenizer.encode(PROMPTS[0])], max_new_tokens=8, repetition_penalty=1.05)
    code, out, err = run("generate", "--model", model, "--prompt", PROMPTS[0], "--max-new-tokens", 8)
    assert (code, out, err) == (0, tokenizer.decode(expected[0].tolist(), control_tokens=False) + "\n", "")


def test_generate_on_a_mesh(run, model):
    """The same answer from eight devices; a mesh that does not fit is refused before the weights are read."""
    argv = ["generate", "--model", model, "--prompt", PROMPTS[0], "--max-new-tokens", 8]
    assert run(*argv, "--mesh", "data=2,fsdp=-1,tensor=2") == run(*argv)
    for mesh, message in {
        "tensor=3": "mesh tensor=3 is 3 devices, but there are 8",
        "model=8": "unknown mesh axis 'model'",
        "data=4,expert=2": "expert=2 splits experts, but this model is dense; use fsdp=2",
    }.items():
        fails(run(*argv, "--mesh", mesh), message)


def test_generate_json(run, model):
    flags = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    code, out, err = run("generate", "--model", model, *flags, "--max-new-tokens", 8, "--batch-size", 2, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [entry["prompt"] for entry in report["prompts"]] == PROMPTS
    for entry in report["prompts"]:
        alone = json.loads(
            run("generate", "--model", model, "--prompt", entry["prompt"], "--max-new-tokens", 8, "--json")[1]
        )
        assert alone["prompts"] == [entry]
        assert len(entry["ids"]) == 8 and not entry["ended"]
    assert report["tokens"] == {"prefill": 7 + 3 + len(report["prompts"][2]["prompt_ids"]), "decode": 3 * 7}
    assert set(report["seconds"]) == {"load", "compile", "prefill", "decode"}
    assert all(rate > 0 for rate in report["tokens_per_second"].values())


def test_generate_reads_files_and_standard_input(run, model, type_in, tmp_path):
    def ids(*flags):
        out = run("generate", "--model", model, "--max-new-tokens", 4, "--json", *flags)[1]
        return [entry["prompt_ids"] for entry in json.loads(out)["prompts"]]

    tokenizer = Tokenizer.from_folder(model)
    text = "\n".join(PROMPTS) + "\n"
    (tmp_path / "prompts").write_text(text)
    each = [tokenizer.encode(prompt) for prompt in PROMPTS]
    whole = [tokenizer.encode("\n".join(PROMPTS))]
    assert ids("--prompt-file", tmp_path / "prompts") == whole
    assert ids("--prompt-file", tmp_path / "prompts", "--lines") == each
    type_in(text)
    assert ids() == whole
    type_in(text)
    assert ids("--lines") == each
    (tmp_path / "prompts").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())  # as Windows writes it
    assert ids("--prompt-file", tmp_path / "prompts", "--lines") == each
    chat = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}])
    assert ids("--prompt", PROMPTS[0], "--chat") == [tokenizer.encode(chat)]


def test_generate_marks_several_answers(run, model):
    code, out, _ = run("generate", "--model", model, "--prompt", "a", "--prompt", "b", "--max-new-tokens", 3)
    assert code == 0
    assert out.startswith("--- 1 of 2\n") and "\n--- 2 of 2\n" in out


@pytest.mark.slow
def test_generate_in_two_processes(run, model, tmp_path):
    """On a mesh over both of them only the first one prints, and what one process prints."""
    flags = ["generate", "--model", model, "--max-new-tokens", 6, "--mesh", "data=2,tensor=4", "--json"]
    wanted = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    first, second = run_processes([*flags, *wanted], 2, 4, tmp_path)
    assert second == ""
    assert json.loads(first)["prompts"] == json.loads(run(*flags, *wanted)[1])["prompts"]


def test_processes_must_have_the_same_prompts(run, model, monkeypatch):
    flags = ["generate", "--model", model, "--prompt", "a"]
    monkeypatch.setattr("qwen2_jax.commands.generate.same_everywhere", lambda prompts: False)
    fails(run(*flags), "the processes of this run have different prompts")


def test_generate_stops_at_any_stop_id(run, model):
    flags = ["generate", "--model", model, "--prompt", PROMPTS[0], "--max-new-tokens", 8, "--json"]
    free = json.loads(run(*flags)[1])["prompts"][0]
    stopped = json.loads(run(*flags, "--stop-ids", 5, free["ids"][3])[1])["prompts"][0]
    assert stopped["ids"] == free["ids"][: free["ids"].index(free["ids"][3]) + 1]
    assert stopped["ended"] and not free["ended"]


def test_generate_samples_by_seed(run, model):
    flags = ["generate", "--model", model, "--prompt", PROMPTS[0], "--max-new-tokens", 8, "--temperature", 1.5]
    answers = [run(*flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_generate_mistakes(run, model, type_in, tmp_path):
    flags = ["generate", "--model", model]
    fails(run("generate", "--model", tmp_path / "nowhere", "--prompt", "a"), "nowhere")
    fails(run("generate", "--model", tmp_path, "--prompt", "a"), "config.json")
    fails(run(*flags, "--prompt", ""), "the prompt is empty")
    fails(run(*flags, "--prompt", "a", "--prompt", ""), "prompt 2 of 2 is empty")
    type_in("")
    fails(run(*flags), "the prompt is empty")
    type_in("one\n\nthree\n")
    fails(run(*flags, "--lines"), "standard input: blank where a prompt should be, line 2; remove it")
    type_in("")
    fails(run(*flags, "--lines"), "the prompt is empty")
    type_in(b"\xff")
    fails(run(*flags), "standard input is not UTF-8")
    fails(run(*flags, "--prompt", "\udcff"), "surrogates not allowed")
    fails(run(*flags, "--prompt-file", tmp_path / "nothing"), "nothing: No such file")
    fails(run(*flags, "--prompt", "a", "--prompt-file", "b"), "--prompt-file")
    fails(run(*flags, "--prompt", " a" * 97), "97", "96")
    fails(run(*flags, "--prompt", " a" * 50, "--max-new-tokens", 47), "97", "96")
    fails(run(*flags, "--prompt", "a", "--max-new-tokens", 0), "max_new_tokens")
    fails(run(*flags, "--prompt", "a", "--stop-ids", 151936), "151936")
    fails(run(*flags, "--prompt", "a", "--temperature", -1), "temperature must be 0 or more")
    fails(run(*flags, "--prompt", "a", "--temperature", "1e-46"), "float32", "1e-46")
    fails(run(*flags, "--prompt", "a", "--repetition-penalty", "inf"), "float32", "inf")
    fails(run(*flags, "--prompt", "a", "--top-k", 5), "--top-k changes nothing at temperature 0")
    fails(run(*flags, "--prompt", "a", "--batch-size", 0), "--batch-size")
    fails(run(*flags, "--prompt", "a", "--seed", 2**31), "--seed")


def test_tokenizer_and_model_must_fit(run, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 151000}))
    fails(run("generate", "--model", folder, "--prompt", "a"), "151000", "151669")


def test_a_checkpoint_that_names_no_end_has_its_tokenizers(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    (folder / "generation_config.json").unlink()
    assert Session(SessionOptions(model=str(folder))).generation.eos_ids == (151645,)
    assert Session(SessionOptions(model=str(folder), stop_ids=())).generation.eos_ids == ()
    assert Session(SessionOptions(model=str(model))).generation.eos_ids == (151645, 151643)


def test_damaged_files_beside_the_weights(run, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    flags = ["generate", "--model", folder, "--prompt", "a"]
    (folder / "generation_config.json").write_text('{"pad_token_id": 151936}')
    fails(run(*flags), "pad_token_id is 151936")
    (folder / "generation_config.json").write_text('{"max_new_tokens": -5}')
    fails(run(*flags), "generation_config.json", "max_new_tokens")
    (folder / "generation_config.json").unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    fails(run(*flags), "chat_template.jinja is not UTF-8")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('\x1b[2Jevil\nline') }}")
    fails(run(*flags, "--chat"), r"\x1b[2Jevil line")
    (folder / "chat_template.jinja").write_text("")
    fails(run(*flags, "--chat"), "the prompt '' has no tokens")


def test_generate_on_a_terminal_says_what_it_waits_for(run, model, type_in, monkeypatch):
    type_in("")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    code, _, err = run("generate", "--model", model)
    assert code == 2 and err.startswith("reading the prompt from standard input; Ctrl-D ends it\n")


def test_processes_end_like_commands(model):
    command = [sys.executable, "-m", "qwen2_jax", "generate", "--model", str(model)]
    with subprocess.Popen([*command, "--prompt", "a"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head -0` does
        assert process.stderr.read() == b""
    assert process.returncode == 141
    done = subprocess.run(
        [*command, "--prompt", "a"], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "foo"}
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Unable to initialize backend 'foo'" in done.stderr


def test_control_c_ends_generate_by_the_signal(model):
    prompts = [flag for number in range(60) for flag in ("--prompt", f"{number} ")]
    command = [sys.executable, "-m", "qwen2_jax", "generate", "--model", str(model), "--batch-size", "1", *prompts]
    # An encoding that cannot hold the answers must not stop them.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(1) == b"-"  # the first answer of 60 is there
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT


# chat


def test_chat_answers_piped_lines(run, model, type_in):
    type_in("hello\n\nand you?\n/reset\nhello\n/help\n/nonsense\n/exit\nnever read\n")
    code, out, err = run("chat", "--model", model, "--max-new-tokens", 5, "--system", "Be brief.")
    assert code == 0
    assert "Ctrl-C stops an answer" in err and "no command /nonsense" in err
    first = run("generate", "--model", model, "--max-new-tokens", 5, "--prompt", chat_text(model, "hello"))[1]
    assert out.startswith(first) and out.endswith(first) and out != first + first


def chat_text(model, message: str) -> str:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": message}]
    return Tokenizer.from_folder(model).apply_chat_template(messages)


def test_chat_remembers_a_stopped_answer(model, monkeypatch, capsys):
    def interrupted(self, prompt):
        yield "half an "
        raise KeyboardInterrupt

    chat = Chat(Session(SessionOptions(model=str(model))))
    monkeypatch.setattr(Session, "stream", interrupted)
    chat.hear("hello")
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "half an "}]
    assert capsys.readouterr() == ("half an \n", " [stopped]")


def test_chat_survives_what_does_not_fit(model, capsys):
    chat = Chat(Session(SessionOptions(model=str(model))))
    chat.hear("a " * 200)
    assert chat.messages == []
    assert "the conversation fills the model's 96 positions" in (err := capsys.readouterr().err)
    assert err.endswith("/reset starts over\n")
    chat.session.tokenizer.template = "{% if"
    chat.hear("hello")
    assert "the chat template failed" in (err := capsys.readouterr().err) and "/reset" not in err


def test_chat_from_a_pipe_fails_with_its_message(run, model, type_in):
    type_in("a " * 200 + "\nnever read\n")
    fails(run("chat", "--model", model), "the conversation fills the model's 96 positions")
    type_in(b"\xff\n")
    fails(run("chat", "--model", model), "standard input is not UTF-8")


def test_control_c_ends_a_chat_from_a_pipe(model):
    command = [sys.executable, "-m", "qwen2_jax", "chat", "--model", str(model), "--max-new-tokens", "3"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT


def test_control_c_ends_an_answer_and_not_the_chat(model):
    """In a real terminal: the first Ctrl-C comes while an answer is being made, then the chat still obeys."""
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-m", "qwen2_jax", "chat", "--model", str(model), "--max-new-tokens", "40"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)

    def read_until(mark: bytes, seconds: float = 60) -> bool:
        seen, end = b"", time.monotonic() + seconds
        while mark not in seen:
            if not select.select([master], [], [], max(0, end - time.monotonic()))[0]:
                return False
            seen += os.read(master, 4096)
        return True

    try:
        assert read_until(b"> ")
        for _ in range(10):  # a Ctrl-C before `input` listens is only noticed with the next key
            process.send_signal(signal.SIGINT)
            if read_until(b"(/exit leaves)", seconds=3):
                break
        for _ in range(10):  # on a busy machine a Ctrl-C comes before the line was taken, or after the answer's end
            os.write(master, b"hello\n")
            assert read_until(b"hello\r\n")
            time.sleep(0.1)  # compiling takes longer
            process.send_signal(signal.SIGINT)
            if stopped := read_until(b"[stopped]", seconds=5):
                break
        assert stopped
        os.write(master, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_prompts_of_several_lengths_pad_nothing_visible(model):
    session = Session(SessionOptions(model=str(model), max_new_tokens=4))
    prompts = [[1, 2, 3], [4], [5, 6]]
    together = session.start(prompts).advance()
    alone = np.concatenate([session.start([prompt]).advance() for prompt in prompts])
    np.testing.assert_array_equal(together, alone)
