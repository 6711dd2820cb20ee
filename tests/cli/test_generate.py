# SPDX-License-Identifier: Apache-2.0
"""`gemma generate` on a fake model: what is written where, decoding flags, stops, seeds, the JSON."""

import json

import pytest

PROMPT = "The history"


def test_prompt_and_continuation_and_one_newline(cli, fake):
    fake(" of computing.")
    result = cli("generate", PROMPT)
    assert result == (0, "The history of computing.\n", "")


def test_no_echo(cli, fake):
    fake(" of computing.")
    assert cli("generate", PROMPT, "--no-echo").out == " of computing.\n"


def test_stream_and_no_stream_write_the_same(cli, fake):
    fake(" of ü 🙂 漢字.")
    assert cli("generate", PROMPT, "--no-stream") == cli("generate", PROMPT) == (0, "The history of ü 🙂 漢字.\n", "")


def test_a_pipe_gets_the_bytes_and_a_terminal_no_control_characters(cli, fake):
    fake(" \x1b[31mred\x07\ttab")
    assert cli("generate", PROMPT).out == "The history \x1b[31mred\x07\ttab\n"
    assert cli("generate", PROMPT, terminal=True).out == "The history \ufffd[31mred\ufffd\ttab\n"


def test_stop_strings_end_before_themselves(cli, fake):
    fake(" of computing.\nMore")
    assert cli("generate", PROMPT, "--stop", r"\n").out == "The history of computing.\n"
    assert cli("generate", PROMPT, "--stop", "nothing", "--stop", "put").out == "The history of com\n"


def test_max_new_tokens(cli, fake):
    fake(" of computing.")
    assert cli("generate", PROMPT, "-n", "4").out == "The history of \n"
    assert cli("generate", PROMPT, "-n", "1").out == "The history \n"


def test_a_character_cut_by_the_limit_becomes_a_replacement(cli, fake):
    fake("🙂")
    assert cli("generate", PROMPT, "-n", "2").out == "The history\ufffd\n"


@pytest.mark.parametrize("stdin", [b"The history", b"The history\n", b"The history\r\n", b"\xef\xbb\xbfThe history\n"])
def test_pipes_and_files(cli, fake, tmp_path, stdin):
    double = fake(" is.")
    file = tmp_path / "prompt.txt"
    file.write_bytes(stdin)
    for arguments in (["-"], [], ["--prompt-file", file]):
        assert cli("generate", *arguments, stdin=stdin).out == "The history is.\n"
        assert double.runner.history(0)[:12] == tuple(double.tokenizer.encode(PROMPT, add_bos=True))


def test_only_one_newline_is_dropped(cli, fake):
    fake("x")
    assert cli("generate", "-", stdin=b"a\n\n").out == "a\nx\n"


def test_special_spellings_in_the_prompt_are_tokens(cli, fake):
    double = fake("x")
    cli("generate", "<start_of_turn>a")
    assert double.runner.history(0)[:3] == (2, 5, 107)


def test_greedy_by_default_and_seeds_otherwise(cli, fake):
    fake()
    plain = cli("generate", PROMPT, "-n", "30").out
    assert plain == cli("generate", PROMPT, "-n", "30", "--seed", "9").out
    hot = ("generate", PROMPT, "-n", "30", "--temperature", "50")
    assert cli(*hot, "--seed", "1").out == cli(*hot, "--seed", "1").out != cli(*hot, "--seed", "2").out
    assert cli(*hot).out != cli(*hot).out  # 30 draws from 266 ids


def test_flags_reach_the_sampler(cli, fake):
    fake()
    greedy = cli("generate", PROMPT, "-n", "20").out
    hot = ("generate", PROMPT, "-n", "20", "-t", "50", "--seed", "1")
    for only_the_best in (("--top-k", "1"), ("--top-p", "0"), ("--min-p", "1")):
        assert cli(*hot, *only_the_best).out == greedy
    assert cli("generate", PROMPT, "-n", "20", "--repetition-penalty", "50").out != greedy


def test_json(cli, fake):
    double = fake(" of.")
    result = cli("generate", PROMPT, "--json", "--model", "some/model", "--dtype", "bfloat16")
    data = json.loads(result.out)
    assert result.out.count("\n") == 1 and result.err == ""
    assert double.opened == ("some/model", "auto", "bfloat16")
    ids = double.tokenizer.encode(" of.")
    timings = data.pop("timings")
    assert set(timings) == {"load", "prompt", "decode", "tokens_per_second"}
    assert data == {
        "model": "some/model",
        "prompt": PROMPT,
        "text": " of.",
        "prompt_ids": double.tokenizer.encode(PROMPT, add_bos=True),
        "ids": [*ids, 1],
        "finish_reason": "stop",
        "stopped_by": "<eos>",
        "seed": None,
        "counts": {"prompt": 12, "generated": 5},
    }


def test_json_reasons(cli, fake):
    fake(" of computing")
    cut = json.loads(cli("generate", PROMPT, "--json", "-n", "3").out)
    assert (cut["text"], cut["finish_reason"], cut["stopped_by"]) == (" of", "length", None)
    stopped = json.loads(cli("generate", PROMPT, "--json", "--stop", "com").out)
    assert (stopped["text"], stopped["finish_reason"], stopped["stopped_by"]) == (" of ", "stop", "com")
    drawn = json.loads(cli("generate", PROMPT, "--json", "-t", "1", "-n", "2").out)
    again = json.loads(cli("generate", PROMPT, "--json", "-t", "1", "-n", "2", "--seed", str(drawn["seed"])).out)
    assert again["ids"] == drawn["ids"]


def test_context_is_what_the_run_needs(cli, fake):
    double = fake(" of computing")
    cli("generate", PROMPT, "-n", "20")
    assert double.runner.info.max_len == 12 + 20
    cli("generate", PROMPT, "-n", "20", "--context", "100")
    assert double.runner.info.max_len == 100


def test_without_a_number_it_generates_what_the_context_has_room_for(cli, fake):
    double = fake()
    data = json.loads(cli("generate", "x" * 120, "--json").out)
    assert data["counts"] == {"prompt": 121, "generated": 7} and data["finish_reason"] == "length"
    assert double.runner.info.max_len == 128


def test_model_that_ends_at_once(cli, fake):
    fake("")
    assert cli("generate", PROMPT) == (0, "The history\n", "")
