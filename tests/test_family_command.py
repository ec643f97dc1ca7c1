from facts import raises_naming

from efficientnet.__main__ import FamilyConfig, main
from efficientnet.network.variants import VARIANTS


def cells_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return line.split()


def test_the_family_has_a_row_for_every_variant_with_costs_and_published_results():
    text = main(FamilyConfig())
    for name in VARIANTS:
        assert cells_of(text, name)
    row = cells_of(text, "v2-s")
    assert row[1:6] == ["21,458,488", "8.3656", "G", "300", "384"]
    assert row[7:] == ["83.9", "%", "24", "ms", "7.1", "h", "V2,", "table", "7"]
    assert cells_of(text, "v2-b2")[-4:] == ["-", "-", "-", "-"]


def test_another_size_changes_the_multiply_adds():
    assert cells_of(main(FamilyConfig(image_size=300)), "v2-s")[2] == "5.3076"


def test_layers_prints_each_stage_and_the_sum():
    lines = main(FamilyConfig(layers="b0")).splitlines()
    stages = [line.split() for line in lines[1:11]]
    assert [cells[0] for cells in stages] == [*"012345678", "sum"]
    assert "96 > 24" not in lines[2] and "16 > 24" in lines[3]
    assert "16,714" in lines[3] and "54,945,216" in lines[3]
    assert "5,288,548" in lines[10] and "385,814,752" in lines[10]
    assert "at 224 px" in lines[-2]


def test_unknown_variants_and_sizes_are_refused():
    with raises_naming(ValueError, "v2-s"):
        main(FamilyConfig(layers="v2s"))
    with raises_naming(ValueError, "--image-size"):
        FamilyConfig(image_size=0)
