"""Counts and times -> how sure they are: intervals of a share."""

# 95 %, of the normal distribution.
NORMAL_QUANTILE = 1.959963984540054


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return where a share of 95 % confidence lies, 0..1 (Wilson 1927).

    Unlike the share plus or minus two standard errors it holds for few images, and near 0 and 1.

    Raises:
        ValueError: no images, or more hits than images.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} hits of {count} images, expected 0 to all of at least one")
    z, share = NORMAL_QUANTILE, hits / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    # Exactly 0 and 1 at the ends, where rounding would be a little off.
    low = 0.0 if hits == 0 else (middle - half) / scale
    high = 1.0 if hits == count else (middle + half) / scale
    return low, high
