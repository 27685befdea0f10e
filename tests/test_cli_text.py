"""The command line prints data without control characters of terminals and without secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2filter.cli import main as cli
from d2filter.cli import options, printing
from d2filter.formats import logs
from d2filter.formats.paths import Folder
from d2filter.tools import explain

HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\nd2filter: done\u2028c\x9b31m\u202ed\rx"
SECRET = "https://me:s3cret@host.invalid/a/0.tar?X-Amz-Signature=s3cret"


def clean(text: str) -> str:
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "s3cret" not in text
    return text


def test_lines_json_and_errors_are_printed_without_escapes_and_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Folder(str(tmp_path))
    logs.append(out, logs.DRIVER, "run", command="run", stages=["embed"])
    logs.append(out, logs.DRIVER, "task failed", stage="embed", task=HOSTILE, error=SECRET)
    for words in (
        ["status", str(tmp_path)],
        ["status", str(tmp_path), "--json"],
        ["explain", str(tmp_path / HOSTILE.replace("/", "")), "0" * 32],
        ["run", "--shards", HOSTILE, "--out-dir", str(tmp_path / "out")],
        ["run", "--metadata-dir", SECRET.replace("https", "nonsense"), "--out-dir", str(tmp_path)],
        [HOSTILE],
        ["run", "--fraction", HOSTILE],
    ):
        code = cli.main(words)
        told = capsys.readouterr()
        clean(told.out)
        assert clean(told.err).count("\n") == (code != 0), words
        assert "d2filter: done" not in (told.out + told.err).splitlines()
        if "--json" in words:
            json.loads(told.out)


def test_text_about_a_sample_is_printed_without_escapes_and_secrets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    entry = {
        "stage": "embed",
        "status": "bad",
        "reason": "no image",
        "message": f'{HOSTILE} "{SECRET}"',
        "shard": SECRET,
        "key": HOSTILE,
        "uid": "0" * 32,
    }
    one = explain.NotRanked(uid="0" * 32, entries=(entry,))
    for line in explain.lines(one):
        printing.say(line)
    assert len(clean(capsys.readouterr().out).splitlines()) == 2
    printing.say_json(explain.as_json([one]))
    (found,) = json.loads(clean(capsys.readouterr().out))
    assert found["entries"][0]["key"] == HOSTILE
    assert found["entries"][0]["shard"] == "https://host.invalid/a/0.tar"


@pytest.mark.parametrize("command", ["embed", "graph", "run"])
def test_products_can_be_kept_off_gpus_by_every_command_that_makes_some(command: str) -> None:
    arguments = cli.parse([command, "--out-dir", "o", "--device", "cpu"])
    assert options.run_config(arguments).device == "cpu"


@pytest.mark.parametrize("command", ["embed", "graph", "rank", "select", "run"])
def test_help_shows_values_as_they_are_typed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse([command, "--help"])
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "(default: ())" not in shown
