import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_after_vlm_open_clip_timm_and_transforms_import_in_any_process() -> None:
    done = python(
        "import vlm\n"
        "import timm, open_clip\n"
        "from torchvision.transforms import v2\n"
        "from torchvision import transforms\n"
        "print(open_clip.__version__)"
    )
    assert done.returncode == 0, done.stderr


def test_importing_vlm_alone_does_not_import_torch() -> None:
    done = python("import sys, vlm; print('torch' in sys.modules, 'torchvision' in sys.modules)")
    assert done.stdout.split() == ["False", "False"]


def test_installing_twice_puts_one_hook() -> None:
    done = python(
        "import sys, vlm\n"
        "from vlm.torchvision_shim import install\n"
        "install()\n"
        "print(sum(type(f).__module__ == 'vlm.torchvision_shim' for f in sys.meta_path))"
    )
    assert done.stdout.strip() == "1"


def test_another_error_of_torchvision_is_not_swallowed(tmp_path: object) -> None:
    done = python(
        "import sys, pathlib, vlm\n"
        f"folder = pathlib.Path({str(tmp_path)!r}) / 'torchvision'\n"
        "folder.mkdir()\n"
        "(folder / '__init__.py').write_text('raise RuntimeError(\"something else\")')\n"
        "sys.path.insert(0, str(folder.parent))\n"
        "import torchvision\n"
    )
    assert "something else" in done.stderr
