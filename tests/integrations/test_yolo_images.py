"""ultralytics puts its own function in the place of ``PIL.Image.open``; our readers know it.

Where Pillow cannot identify a file, that function asks for the package pi_heif, and ends in an
ImportError if there is none.
"""

import pytest

pytest.importorskip("ultralytics")

READERS = {
    "measure": "from ema_timm.data.images import read_image; read_image(f, 'L', f, 'Do it.')",
    "see": "from ema_timm.see.images import prepare; prepare([f], {'input_size': (3, 8, 8)})",
    "card": "from ema_timm.checkpoints.pictures import _check_picture; _check_picture(Path(f))",
    "check": "from ema_timm.data.images import inspect_image, unreadable\n"
    "    e = inspect_image(f, True)\n"
    "    raise unreadable(f, e, 'Repair it.')",
}
CODE = """
import sys
from pathlib import Path
import PIL.Image
from ultralytics.utils import patches
from ema_timm.errors import UserError
assert PIL.Image.open is patches.image_open
sys.modules["pi_heif"] = None  # as where it is not installed
f = sys.argv[1]
try:
    {reader}
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_no_image_gives_our_line(python, reader, tmp_path):
    picture = tmp_path / "broken.png"
    picture.write_bytes(b"no picture")
    code = CODE.format(reader=READERS[reader])
    # Else it would install the package, here and for whoever has an unreadable picture.
    out = python(code, args=[picture], env={"YOLO_AUTOINSTALL": "false"})
    last = out.strip().splitlines()[-1]
    assert str(picture) in last, out
    assert "cannot identify" in last or "not an image" in last, out
