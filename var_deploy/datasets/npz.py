"""Writes all images of a set as one array, the form that programs which compute FID take."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from numpy.lib import format as npy

from var_deploy.datasets.folder import NPZ_FILE, SetFolder, keeping_shards
from var_deploy.datasets.formats import read_images
from var_deploy.datasets.spec import SetSpec
from var_deploy.files import whole_file

ARRAY = "arr_0"  # the name that the evaluation suite of guided-diffusion looks for


def write_npz(
    folder: SetFolder, spec: SetSpec, on_shard: Callable[[int], object] | None = None
) -> Path:
    """Write uint8 [N, H, W, C] of a complete set, with one image in memory at a time.

    Stored, not compressed, as `np.savez` does, without a time: the same set gives the same bytes.
    `on_shard` is called with the number of shards written.

    Raises VarDeployError for a shard that is missing or damaged, and where the disk refuses.
    """
    path = folder.path / NPZ_FILE
    shards = [folder.whole_shard(spec, shard) for shard in range(spec.shards)]
    shape = next(read_images(shards[0])).shape
    member = zipfile.ZipInfo(f"{ARRAY}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    head = {"descr": "|u1", "fortran_order": False, "shape": (spec.images, *shape)}
    with (
        keeping_shards(),
        whole_file(path) as stream,
        zipfile.ZipFile(stream, "w") as archive,
        archive.open(member, "w", force_zip64=True) as array,
    ):
        npy.write_array_header_1_0(array, head)
        for done, shard in enumerate(shards, 1):
            for image in read_images(shard):
                array.write(image.tobytes())
            if on_shard:
                on_shard(done)
    return path
