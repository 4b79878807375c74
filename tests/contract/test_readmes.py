"""What the READMEs show is what happens."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support import drawn_samples, write_dataset

ROOT = Path(__file__).parents[2]


def blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_example_of_the_data_readme_reads_our_shards_with_plain_webdataset(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path, 3)
    (code,) = blocks("vlm/data/README.md", "python")
    code = code.replace(
        "data/emoji/shards/train/noto-000000.tar", str(tmp_path / "drawn-000000.tar")
    )
    code = code.replace('"webp"', '"png"').replace('["license"]', '["style"]')
    done = subprocess.run(
        [sys.executable, "-c", "import vlm\n" + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first = drawn_samples(1)[0]
    assert done.stdout.strip() == f"{first.key} {first.text} (32, 32) drawn"


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    shown = re.findall(r"^make (\w+)", "".join(blocks("README.md", "sh")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "install"} <= set(shown)
    for target in shown:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_verb_the_readme_shows_exists() -> None:
    shown = set(re.findall(r"^vlm (\w+)", "".join(blocks("README.md", "sh")), re.MULTILINE))
    shown |= set(
        re.findall(r"^vlm (\w+)", "".join(blocks("vlm/train/README.md", "sh")), re.MULTILINE)
    )
    done = subprocess.run([sys.executable, "-m", "vlm", "--help"], capture_output=True, text=True)
    assert shown >= {"data", "train", "export", "index", "serve"}
    for verb in shown:
        assert re.search(rf"\b{verb}\b", done.stdout)


def test_every_link_of_a_readme_leads_somewhere() -> None:
    for readme in [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("vlm/*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
            if "://" not in target:
                assert (readme.parent / target).exists(), f"{readme}: {target}"
