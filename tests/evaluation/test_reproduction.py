import pytest

from sagl.configuration.parser import from_namespace
from sagl.configuration.sample import sample_parser
from sagl.evaluation.paper import paper_items
from sagl.evaluation.reproduction import Target, plan_reproduction, translate_site
from sagl.models.zoo import get_unet_settings
from sagl.settings.guidance import SelfAttentionGuidance

GARMENTS = get_unet_settings("fashion_mnist")[0]
IMAGENET128 = get_unet_settings("imagenet128")[0]
ON_GARMENTS = Target(name="fashion_mnist", network=GARMENTS, classifier="fashion_mnist_classifier", num_samples=500)


def rows(name, target=None):
    return {row.row.name: row for row in plan_reproduction(paper_items()[name], target or Target())}


def options_of(row):
    return dict(zip(row.options[::2], row.options[1::2], strict=True))


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("output.8", "output.5"),  # the finest resolution
        ("output.2", "output.2"),  # the coarsest
        ("input.8", "input.5"),
        ("input.14", "input.8"),
        ("middle", "middle"),
    ],
)
def test_a_block_is_translated_by_the_rank_of_its_resolution(site, expected):
    assert translate_site(site, IMAGENET128, GARMENTS) == expected
    assert translate_site(site, IMAGENET128, IMAGENET128) == site


@pytest.mark.parametrize("site", ["output.5", "input.11"])
def test_a_block_of_an_intermediate_resolution_that_the_network_lacks_is_named(site):
    assert translate_site(site, IMAGENET128, IMAGENET128) == site
    with pytest.raises(LookupError, match=site):
        translate_site(site, IMAGENET128, GARMENTS)


def test_without_a_network_the_settings_are_those_of_the_paper():
    row = rows("table2")["ImageNet 256x256 with labels, SAG 0.2"]
    expected = {"--model": "imagenet256_cond", "--num_samples": "50000", "--sampler": "ddpm", "--respacing": "250"}
    expected |= {
        "--eta": "0",
        "--clip_x0": "true",
        "--sag.scale": "0.2",
        "--sag.site": "output.2",
        "--sag.blur_sigma": "9",
        "--sag.kernel_size": "31",
    }
    assert expected.items() <= options_of(row).items()
    assert row.translation == ()


def test_on_another_network_sigma_shrinks_with_the_image_and_every_change_is_named():
    row = rows("table9", ON_GARMENTS)["sigma 9"]
    assert options_of(row)["--sag.blur_sigma"] == "2.25"
    text = " ".join(row.translation)
    assert all(word in text for word in ("imagenet128", "10000", "output.8", "9 of 128"))


def test_a_network_with_labels_takes_none_where_the_papers_has_none():
    table = rows("table2", ON_GARMENTS)
    assert options_of(table["LSUN Cat"])["--labels"] == "null"
    assert options_of(table["ImageNet 256x256 with labels"])["--labels"] == "random"


def test_a_row_that_cannot_be_made_says_why():
    no_classifier = Target(name="n.safetensors", network=GARMENTS)
    table = rows("table3", no_classifier)
    assert "n.safetensors" in table["classifier"].obstacle
    assert "output.5" in rows("table6", ON_GARMENTS)["output.5"].obstacle
    assert not table["SAG"].obstacle
    assert "dino_checkpoint" in rows("table4")["DINO attention"].obstacle


def test_the_file_of_dino_weights_is_an_option_of_the_row_that_needs_it():
    options = {name: options_of(row) for name, row in rows("table4", Target(dino_checkpoint="dino.pth")).items()}
    assert options.pop("DINO attention")["--sag.dino_checkpoint"] == "dino.pth"
    assert not any("--sag.dino_checkpoint" in row for row in options.values())


def test_rows_of_several_tables_with_equal_options_share_a_run():
    unguided = {rows(name, ON_GARMENTS)["unguided"].run_name for name in ("table4", "table5", "table6", "table9")}
    assert len(unguided) == 1
    assert rows("table5", ON_GARMENTS)["threshold 1.0"].run_name == rows("table9", ON_GARMENTS)["sigma 3"].run_name


def test_other_object_masks_are_another_analysis():
    (silhouette,), (masks,) = (rows("table1", Target(object_masks=m)).values() for m in ("silhouette", "masks"))
    assert options_of(masks)["--object_masks"] == "masks"
    assert silhouette.run_name != masks.run_name
    (heads,) = rows("figure9", Target(object_masks="masks")).values()
    assert "--object_masks" not in heads.options


def test_figure_10_shows_another_sample_than_figure_9():
    (ninth,), (tenth,) = (rows(name).values() for name in ("figure9", "figure10"))
    assert tenth.options != ninth.options
    assert options_of(tenth)["--first_id"] == "1"


def test_every_table_and_figure_of_the_paper_has_a_config():
    assert list(paper_items()) == [f"table{k}" for k in (1, 2, 3, 4, 5, 6, 8, 9, 10)] + [
        f"figure{k}" for k in range(1, 14)
    ]


def test_the_options_of_every_row_are_accepted():
    parser = sample_parser()
    planned = [plan_reproduction(item, target) for item in paper_items().values() for target in (Target(), ON_GARMENTS)]
    options = {row.options: row.row for rows_of_item in planned for row in rows_of_item if not row.obstacle}
    assert len(options) > 40
    for words, row in options.items():
        sag = from_namespace(SelfAttentionGuidance, parser.parse(list(words)).sag)
        assert sag.scale == row.guidances["sag"].get("scale", 0)


def test_what_the_network_recommends_and_a_row_does_not_name_has_its_default():
    recommended = {
        "sag": {"scale": 2.0, "interval": (0.5, 1.0), "shape": "off_unsharp", "site": "middle", "area_fraction": 0.4}
    }
    name = "ImageNet 256x256 with labels, SAG 0.2"
    plain, row = (rows("table2", Target(recommended=r))[name] for r in ({}, recommended))
    assert options_of(row) == {**options_of(plain), "--sag.shape": "none", "--sag.area_fraction": "null"}
    assert {"--sag.scale": "0.2", "--sag.interval": "[0,1]", "--sag.site": "output.2"}.items() <= options_of(
        row
    ).items()


@pytest.mark.parametrize(
    ("name", "flag"),
    [("fashion_mnist", "--model"), ("hf:owner/name", "--model"), ("net.safetensors", "--checkpoint")],
)
def test_a_network_is_named_by_the_flag_that_takes_it(name, flag):
    row = rows("table2", Target(name=name, network=GARMENTS))["ImageNet 256x256 with labels, SAG 0.2"]
    assert options_of(row)[flag] == name


def test_a_run_of_a_network_whose_name_is_not_utf8_has_a_name():
    row = rows("table2", Target(name="caf\udce9.safetensors", network=GARMENTS))
    assert all(r.run_name.startswith("run_") for r in row.values())
