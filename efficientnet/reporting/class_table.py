"""ClassAccuracy -> a table of its classes, or of the worst of them."""

from collections.abc import Sequence

from efficientnet.formats.class_accuracy import ClassAccuracy
from efficientnet.reporting.tables import NOTHING, Table, format_percent

# Of more classes only the worst are listed.
MAX_LISTED_CLASSES, NUM_WORST_CLASSES = 100, 20


def class_table(classes: ClassAccuracy, names: Sequence[str]) -> Table:
    """List images, share and recall of each class; of more than 100 the 20 of lowest recall."""
    recalls, total, notes = classes.recalls, sum(classes.images), ()
    order = list(range(len(names)))
    if len(order) > MAX_LISTED_CLASSES:
        order = sorted(filter(classes.images.__getitem__, order), key=lambda i: recalls[i] or 0.0)
        order = order[:NUM_WORST_CLASSES]
        notes = (f"The {len(order)} classes of lowest recall, of {len(names):,}.",)
    rows: list[tuple[str, ...]] = []
    for index in order:
        recall = recalls[index]
        rows.append(
            (
                names[index],
                f"{classes.images[index]:,}",
                format_percent(classes.images[index] / total),
                NOTHING if recall is None else format_percent(recall),
            )
        )
    columns = ("class", "held-out images", "share", "recall")
    return Table(columns, tuple(rows), frozenset(columns[:1]), notes)
