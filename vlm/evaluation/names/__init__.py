"""Names of classes and sets of prompts, by name.

CIFAR's names are data files beside this one, in the order of its labels (Krizhevsky 2009). Those
of ImageNet, and prompts, are open_clip's, read from the installed library and not copied.
"""

from importlib import resources
from typing import Final, Literal

__all__ = ["ClassSet", "TemplateSet", "class_names", "templates"]

ClassSet = Literal["cifar10", "cifar100", "imagenet1k"]
TemplateSet = Literal["plain", "simple7", "openai_imagenet"]
_PLAIN: Final = ("a photo of a {}.",)


def class_names(name: ClassSet) -> tuple[str, ...]:
    """The names of the classes of a well-known dataset, in the order of its labels."""
    if name == "imagenet1k":
        from open_clip import IMAGENET_CLASSNAMES  # noqa: PLC0415 - seconds, only its users pay

        return tuple(IMAGENET_CLASSNAMES)
    text = resources.files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.split("\n")[:-1])


def templates(name: TemplateSet) -> tuple[str, ...]:
    """Prompts with `{}` for the name of a class.

    `plain` is one, `simple7` the seven that OpenAI found to be enough, `openai_imagenet` the 80
    of CLIP (arXiv:2103.00020, section 3.1.4).
    """
    if name == "plain":
        return _PLAIN
    import open_clip  # noqa: PLC0415 - seconds, only its users pay

    chosen = {
        "simple7": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        "openai_imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
    }[name]
    return tuple(template("{}") for template in chosen)
