"""README and docs: links lead somewhere, Python blocks run as they stand, commands have only options that there are."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from tests.test_accelerate import published
from var_ext.cli import main

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(
    ["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
)
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = sorted({*DOCS, *(ROOT / name for name in TRACKED.stdout.split("\0") if name), *ROOT.glob("*.md")})
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(page: Path) -> list[list[str]]:
    """Of var-ext, as the words that a shell makes of them."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"(var-ext|torchrun) ", line)]
    return [words[words.index("var_ext") + 1 :] if words[0] == "torchrun" else words[1:] for words in found]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", BLOCK.sub("", page.read_text(encoding="utf-8")))
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


RUN = [page for page in [ROOT / "README.md", *DOCS] if blocks(page, "python")]


@pytest.mark.parametrize("page", RUN, ids=named)
def test_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder. Of what a reader has and a page cannot make, there is a model of the published class."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__", "official_var": published()}
    for text in blocks(page, "python"):
        exec(compile(text, named(page), "exec"), names)
    assert page.name != "README.md" or (tmp_path / "digits.png").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_commands_have_such_options(page: Path) -> None:
    for words in commands(page):
        command: click.Command = main
        context = click.Context(main, info_name="var-ext")
        while isinstance(command, click.Group):
            name = words.pop(0)
            found = command.get_command(context, name)
            assert found is not None, f"there is no command {name}"
            command, context = found, click.Context(found, context, info_name=name)
        command.make_parser(context).parse_args(list(words))  # NoSuchOption, BadOptionUsage


def test_a_wrong_option_would_be_seen() -> None:
    command = main.commands["sample"]
    with pytest.raises(click.NoSuchOption):
        command.make_parser(click.Context(command)).parse_args(["--colour", "red"])


def test_no_page_holds_a_merge_in_pieces() -> None:
    marks = re.compile(r"^(<{7}|={7}|>{7})( |$)", re.MULTILINE)
    assert not [named(page) for page in PAGES if marks.search(page.read_text(encoding="utf-8"))]


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)
