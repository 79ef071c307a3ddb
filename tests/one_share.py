"""One process of several, without a model: `python one_share.py OUT`, with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID set. A step of gradient descent on a layer that is spread over all devices, and a checkpoint of it
that all write and read together. Prints one line of JSON: what this process has and has found."""

import contextlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hypervl_jax import checkpoint, mesh

ROWS = 8
X = np.random.default_rng(0).normal(size=(ROWS, 12)).astype(np.float32)


def weights():
    return {"fc1": {"weight": jax.random.normal(jax.random.key(0), (8, 12)), "bias": jnp.arange(8.0)}}


def step(params, x):
    def loss(params):
        return jnp.mean((x @ params["fc1"]["weight"].T + params["fc1"]["bias"]) ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


def main() -> None:
    mesh.start()
    out = Path(sys.argv[1])
    grid = mesh.make(mesh.MeshConfig(fsdp=jax.device_count()))
    held = mesh.rows(grid, ROWS)
    before, batch = mesh.born(grid, weights), mesh.put(grid, X[list(held)], held, ROWS)
    after = jax.jit(lambda p, x: mesh.stay(step(p, x), grid))(before, batch)
    with mesh.first("note"):  # whoever comes later finds it
        found = (out / "note").exists()
        if mesh.leads():
            out.mkdir()
            (out / "note").write_text("mine")
    with contextlib.closing(checkpoint.Checkpoints(out / "c")) as ckpts:
        ckpts.save(1, after)
        again = ckpts.restore(mesh.shapes(grid, jax.eval_shape(weights)))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), mesh.whole(again), mesh.whole(after))
    said = {"process": jax.process_index(), "rows": held, "found": found, "same": jax.tree.all(same)}
    said["part"] = [s.data.shape for s in after["fc1"]["weight"].addressable_shards]
    said["largest"] = mesh.agree(10 + jax.process_index())
    print(json.dumps(said | {"after": jax.tree.map(np.ndarray.tolist, mesh.whole(after))}))


if __name__ == "__main__":
    main()
