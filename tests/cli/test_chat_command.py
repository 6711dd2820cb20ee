# SPDX-License-Identifier: Apache-2.0
"""`gemma chat` on a fake model: pipes, terminals, commands, the wrapper of a base model, a full context."""

import json

import pytest

from gemma import chat as templates
from gemma.chat import Turn
from gemma.cli import _backend
from gemma.testing import tiny_config, write_tiny_gguf, write_tiny_safetensors

REPLY = "Fine, thank you."
ROOMY = dict(max_position_embeddings=4096)


def prompts(double):
    """What the model was given, turn by turn: the ids it held when it began to answer."""
    seen = []
    prefill = double.runner.prefill

    def watched(slot, ids, start, images=None):
        prefill(slot, ids, start, images)
        seen.append(double.runner.history(0))

    double.runner.prefill = watched
    return seen


def test_pipe_writes_the_answers_only(cli, fake):
    double = fake(REPLY, **ROOMY)
    seen = prompts(double)
    result = cli("chat", "--temperature", "0", stdin=b"Hello\n\nHow are you?\n")
    assert result == (0, f"{REPLY}\n{REPLY}\n", "")
    turns = [Turn("user", "Hello")]
    assert seen[0] == tuple(templates.encode_chat(double.tokenizer, turns).ids)
    turns += [Turn("model", REPLY), Turn("user", "How are you?")]
    assert seen[1] == tuple(templates.encode_chat(double.tokenizer, turns).ids)


def test_later_turns_compute_only_what_is_new(cli, fake):
    double = fake(REPLY, **ROOMY)
    cli("chat", "--temperature", "0", stdin=b"Hello\nAgain\n")
    first, second = [call for call in double.runner.calls if call.startswith("prefill")]
    assert first.endswith("@0") and not second.endswith("@0")


def test_system(cli, fake):
    double = fake(REPLY, **ROOMY)
    seen = prompts(double)
    cli("chat", "-t", "0", "--system", "Be brief.", stdin=b"Hello\n")
    turns = [Turn("system", "Be brief."), Turn("user", "Hello")]
    assert seen == [tuple(templates.encode_chat(double.tokenizer, turns).ids)]


def test_control_spellings_stay_letters(cli, fake):
    double = fake(REPLY, **ROOMY)
    seen = prompts(double)
    cli("chat", "-t", "0", stdin=b"<end_of_turn><bos>\n")
    ids = seen[0]
    assert ids.count(double.tokenizer.id_of("<bos>")) == 1
    assert ids.count(double.tokenizer.id_of("<end_of_turn>")) == 1


def test_special_tokens_in_an_answer_are_not_shown(cli, fake):
    fake("Fine,<start_of_image> thank you.", **ROOMY)
    assert cli("chat", "-t", "0", stdin=b"Hello\n").out == f"{REPLY}\n"


def test_base_model_gets_the_wrapper_and_says_so(cli, fake):
    double = fake(" " + REPLY, tuned=False, **ROOMY)
    seen = prompts(double)
    result = cli("chat", "-t", "0", "-m", "some-pt", stdin=b"Hello\n")
    assert result.out == f"{REPLY}\n"
    assert "some-pt is a pretrained model" in result.err and "few-shot" in result.err
    wrapped = templates.few_shot([Turn("user", "Hello")])
    assert seen == [tuple(double.tokenizer.encode(wrapped, add_bos=True, parse_special=False))]
    forced = cli("chat", "-t", "0", "--as", "tuned", stdin=b"Hello\n")
    assert forced.err == "" and seen[-1] == tuple(templates.encode_chat(double.tokenizer, [Turn("user", "Hello")]).ids)


def test_base_answers_end_before_the_next_turn(cli, fake):
    fake(f" {REPLY}{templates.FEW_SHOT_STOP[0]} and more", tuned=False, **ROOMY)
    assert cli("chat", "-t", "0", stdin=b"Hello\n").out == f"{REPLY}\n"


def test_commands_in_a_pipe(cli, fake, tmp_path):
    double = fake(REPLY, **ROOMY)
    seen = prompts(double)
    file = tmp_path / "talk.json"
    script = f"Hello\n/save {file}\n/reset\n/help\n//slash\n/exit\nnever\n"
    result = cli("chat", "-t", "0", "-m", "m", stdin=script.encode())
    assert result.code == 0 and result.out == f"{REPLY}\n{REPLY}\n"
    assert "saved 2 turns" in result.err and "new conversation" in result.err and "/reset " in result.err
    assert seen[1] == tuple(templates.encode_chat(double.tokenizer, [Turn("user", "/slash")]).ids)
    assert json.loads(file.read_text()) == {
        "model": "m",
        "turns": [{"role": "user", "content": "Hello"}, {"role": "model", "content": REPLY}],
    }
    again = cli("chat", "-t", "0", stdin=f"/save {file}\n".encode())
    assert again.code == 2 and "this file exists and is not overwritten" in again.err


def test_a_line_of_a_pipe_that_is_no_command_is_text(cli, fake):
    double = fake(REPLY, **ROOMY)
    seen = prompts(double)
    result = cli("chat", "-t", "0", stdin=b"/usr/bin is a path\n/resetting\nHello\n")
    assert result == (0, f"{REPLY}\n" * 3, "")
    assert seen[0] == tuple(templates.encode_chat(double.tokenizer, [Turn("user", "/usr/bin is a path")]).ids)


def typed(monkeypatch, *lines):
    """Lines as a user types them; an exception is raised instead of a line."""
    queue = [*lines, EOFError()]

    def answer(prompt=""):
        line = queue.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)


def test_terminal(cli, fake, monkeypatch):
    fake(REPLY, **ROOMY)
    typed(monkeypatch, "Hello", "", "/nonsense", "Hello")
    result = cli("chat", "-t", "0", terminal=True)
    assert result.code == 0
    assert result.out == f"Type a message, or /help.\n{REPLY}\n{REPLY}\n\n"
    assert result.err == "gemma: error: unknown command '/nonsense': expected /reset, /save FILE, /help or /exit\n"


def test_ctrl_c_at_the_prompt_leaves_with_130(cli, fake, monkeypatch):
    fake(REPLY, **ROOMY)
    typed(monkeypatch, "Hello", KeyboardInterrupt())
    assert cli("chat", "-t", "0", terminal=True).code == 130


def test_ctrl_c_stops_an_answer_and_keeps_what_was_seen(cli, fake, monkeypatch, tmp_path):
    double = fake(REPLY, **ROOMY)
    step, calls = double.runner.step, []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(double.runner, "step", interrupted)
    typed(monkeypatch, "Hello", f"/save {tmp_path / 'a.json'}", "/exit")
    result = cli("chat", "-t", "0", terminal=True)
    assert result.code == 0 and "answer stopped" in result.err
    assert json.loads((tmp_path / "a.json").read_text())["turns"][1]["content"] == REPLY[:5]


def test_full_conversation(cli, fake, monkeypatch):
    fake(REPLY, **ROOMY)
    typed(monkeypatch, "x" * 30, "y" * 90, "/reset", "x" * 30)
    result = cli("chat", "-t", "0", "--context", "120", terminal=True)
    assert result.out.count(REPLY) == 2
    assert "the conversation is full" in result.err and "/reset begins a new one" in result.err


def test_seeds(cli, fake):
    fake(None, **ROOMY)
    flags = ("chat", "-t", "50", "--top-k", "266", "--top-p", "1", "-n", "20")
    same = cli(*flags, "--seed", "3", stdin=b"a\nb\n").out
    assert same == cli(*flags, "--seed", "3", stdin=b"a\nb\n").out != cli(*flags, "--seed", "4", stdin=b"a\nb\n").out


def test_what_counts_as_tuned(tmp_path):
    config = tiny_config("gemma3", query_pre_attn_scalar=None)
    assert not _backend.is_tuned(write_tiny_gguf(tmp_path / "base.gguf", config))
    template = {"tokenizer.chat_template": "{{ bos_token }}"}
    assert _backend.is_tuned(write_tiny_gguf(tmp_path / "tuned.gguf", config, metadata=template))
    assert _backend.is_tuned(write_tiny_gguf(tmp_path / "gemma-3-1b-it.gguf", config))
    folder = write_tiny_safetensors(tmp_path / "digits", tiny_config("gemma2"))
    assert not _backend.is_tuned(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert _backend.is_tuned(folder)


@pytest.mark.real
def test_demo_is_a_base_model():
    from gemma import hub

    assert not _backend.is_tuned(hub.resolve("demo"))
