"""A store of 200,000 images: it opens, reads and resumes right, in little memory beside the data."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from theworld.store.reader import StoreReader
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store

NUM_IMAGES, SHARD_SIZE = 200_000, 512
LATENT = ArraySpec("latents", (16, 4, 4), "float32")
LIMIT = 500  # MB beside the data

# In a process of its own, as memory that others once used would be counted too. MB; VmHWM is the most there was.
MEASURE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from theworld.extraction.features import CachedFeatures, in_cache
from theworld.training.schedule import Order
from theworld.store.reader import StoreReader
from theworld.data.vsr import Statement

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(key))

before = memory("VmRSS")
reader = StoreReader(sys.argv[1])
paths = list(reader.images)
for row in [*range(0, len(paths), 512), *np.random.default_rng(0).integers(0, len(paths), 5000).tolist()]:
    assert reader.read(paths[row], "latents")[3, 2, 1] == row
opened = memory("VmHWM") - before
del reader

rows = CachedFeatures(Path(sys.argv[1]))
statements = [Statement(path, "caption", 1, "on", index) for index, path in enumerate(paths)]
kept, note = in_cache(statements, rows, Path("."))
order = Order(kept, 0)
for start in (0, 16, 199_990):
    chosen = order.take(start, 16)
    assert rows([s.image for s in chosen])[:, 3, 2, 1].tolist() == [s.index for s in chosen]
for start in range(0, len(paths), 64):
    chosen = order.take(start, 64)
    assert rows([s.image for s in chosen])[:, 3, 2, 1].tolist() == [s.index for s in chosen]
data = rows.reader.nbytes("latents") / 1e6
print(json.dumps({"note": note, "opened": opened, "data": data, "most": memory("VmHWM") - before}))
"""


@pytest.mark.heavy
def test_two_hundred_thousand_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [
        ImageEntry(f"train2017/{number:012}.jpg", hashlib.sha256(str(number).encode()).hexdigest())
        for number in range(NUM_IMAGES)
    ]
    store = Store.create(tmp_path, {"model": "x"}, images, [LATENT], SHARD_SIZE)
    assert store.num_shards == 391
    for shard in range(391):
        rows = np.arange(len(store.shard_rows(shard)), dtype=np.float32) + shard * SHARD_SIZE
        store.write_shard(
            shard, {"latents": np.broadcast_to(rows[:, None, None, None], (len(rows), 16, 4, 4))}
        )
    store.publish()
    again = Store.create(tmp_path, {"model": "x"}, images, [LATENT], SHARD_SIZE)
    assert (again.pending([390, 7]), again.pending(), caplog.messages) == ([], [], [])
    assert StoreReader(tmp_path).verify() == []
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path)]
    found = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert found["note"] == "200000 of 200000 statements, 200000 of 200000 images"
    assert found["opened"] < LIMIT
    assert found["data"] == NUM_IMAGES * 1024 / 1e6
    assert found["most"] < LIMIT, found
