"""Labels of a sample, as numbers that are alike wherever the labels are."""

from vlm.data.samples import Sample, hash_text
from vlm.errors import DataError

__all__ = ["label_ids"]


def label_ids(sample: Sample, field: str, *, most: int) -> list[int]:
    """63-bit ids of the values that a sample's metadata has under `field`, padded with -1.

    Args:
        sample: Its metadata holds one label or a list of them.
        field: Key of the metadata.
        most: How many ids are returned; further labels are left out.

    Raises:
        DataError: If the sample has no such field, or it holds what is no label.
    """
    found = sample.metadata.get(field)
    values = found if isinstance(found, list) else [found]
    if found is None or not all(isinstance(value, str | int) for value in values):
        message = (
            f"sample {sample.key!r}: data.stream.label_field={field!r} is to be a label or a list "
            f"of labels (texts, whole numbers) in its .json, which has "
            f"{', '.join(sorted(sample.metadata)) or 'no keys'}; name another, or leave it out"
        )
        raise DataError(message)
    ids = [hash_text(str(value)) >> 1 for value in dict.fromkeys(values)][:most]
    return ids + [-1] * (most - len(ids))
