import pytest

from sagl.playground.session import GUIDED
from tests.helpers.errors import refused
from tests.helpers.networks import write_grey_unet
from tests.helpers.playground import compare, make_playground

WEAK = ["--sag.scale=0", "--autoguidance.scale=1"]


@pytest.fixture
def playground(tmp_path):
    """A playground whose guidance has a weight file of its own."""
    weak = write_grey_unet(tmp_path / "weak.safetensors", num_res_blocks=2)
    return make_playground(tmp_path, *WEAK, f"--autoguidance.checkpoint={weak}")


def offer(playground):
    """Sample, and return the key of the download."""
    return playground.offer(compare(playground))[GUIDED]


@pytest.mark.parametrize(("name", "parameter"), [("tiny", "checkpoint"), ("weak", "autoguidance.checkpoint")])
@pytest.mark.parametrize("replace", [lambda path: write_grey_unet(path, num_res_blocks=3), lambda path: path.unlink()])
def test_images_of_a_weight_file_that_was_replaced_or_removed_have_no_download(
    playground, tmp_path, name, parameter, replace
):
    download = playground.downloads[offer(playground)]
    assert download.zip()
    replace(tmp_path / f"{name}.safetensors")
    with refused(f"`{parameter}`"):
        download.zip()


def test_a_file_that_is_replaced_while_it_is_sampled_belongs_to_no_download(playground, tmp_path):
    form = playground.form
    steps = playground.compare(form.network, form.start_values(form.network))
    next(steps)
    write_grey_unet(tmp_path / "tiny.safetensors", num_res_blocks=3)
    *_, last = steps
    with refused("`checkpoint`"):
        playground.downloads[playground.offer(last)[GUIDED]].zip()


def test_the_server_says_why_a_run_folder_cannot_be_had(playground, tmp_path):
    server = pytest.importorskip("sagl.playground.server", exc_type=ImportError)
    key = offer(playground)
    assert server.download(playground, key).media_type == "application/zip"
    write_grey_unet(tmp_path / "tiny.safetensors")
    for response, status, part in (
        (server.download(playground, key), 409, "--checkpoint"),
        (server.download(playground, "unknown"), 404, "Sample again"),
    ):
        assert_refused(response, status, part)


def test_the_server_keeps_no_images_of_another_network_than_the_last(playground, tmp_path):
    server = pytest.importorskip("sagl.playground.server", exc_type=ImportError)
    key = offer(playground)
    write_grey_unet(tmp_path / "tiny.safetensors")
    compare(playground)
    assert_refused(server.download(playground, key), 404, "Sample again")


def assert_refused(response, status, part):
    """Require an answer of one line."""
    assert response.status_code == status
    assert len(response.body.decode().splitlines()) == 1
    assert part in response.body.decode()
