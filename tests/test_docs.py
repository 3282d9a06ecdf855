"""The code in README and docs runs as it stands, and every file they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def test_tour_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(ROOT / "docs" / "tour.md")
    assert len(found) >= 8
    names: dict[str, object] = {}
    for number, block in enumerate(found, 1):
        exec(compile(block, f"tour.md block {number}", "exec"), names)
    assert "op 3 Concat: features are at 1/2" in capsys.readouterr().out


@pytest.mark.slow
def test_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a folder of pictures where the example says one is, and a few steps instead of all."""
    from undiffuse import images

    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    folder = tmp_path / "path" / "to" / "images"
    folder.mkdir(parents=True)
    pictures, _ = images.load("photos").train.fixed(12)
    for number, picture in enumerate(pictures):
        images.save_image(picture, folder / f"{number}.png")
    short = re.sub(r"resolution=\d+", "resolution=8, max_train_steps=3, train_batch_size=4", block)
    assert short != block
    exec(compile(short, "README.md", "exec"), {})
    assert (tmp_path / "grid.png").stat().st_size > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []
