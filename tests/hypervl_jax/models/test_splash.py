"""The TPU kernel, interpreted on the CPU, against XLA; and compiled by the TPU compiler where it is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import partitioning
from hypervl_jax.architecture import DecoderConfig, VisionConfig
from hypervl_jax.models.attention import attention, splash_obstacle
from hypervl_jax.models.qwen3 import Decoder
from hypervl_jax.models.runtime import DECODER_REMAT, RuntimeConfig
from hypervl_jax.models.siglip2 import VisionTower
from hypervl_jax.models.splash import LARGEST_BLOCK, block_grid, splash_attention
from hypervl_jax.partitioning import MeshConfig

LAYOUT = ("rows", "length")
TOWER_LAYOUT = ("rows", None)


def make_inputs(rows: int, length: int, heads: int, groups: int, width: int) -> tuple[jax.Array, ...]:
    """Query, key, value and the weights of a sum over the output."""
    rng = np.random.default_rng(0)
    draw = lambda count: jnp.asarray(rng.normal(size=(rows, length, count, width)), jnp.float32)
    return draw(heads), draw(groups), draw(groups), draw(heads)


def packed_segments(rows: int, length: int) -> np.ndarray:
    """Three documents of a few lengths a row, then padding over the last eighth."""
    cuts = [np.sort(np.random.default_rng(row).integers(1, length - length // 8, 2)) for row in range(rows)]
    places = np.arange(length)
    ids = np.stack([1 + (places >= first).astype(int) + (places >= second) for first, second in cuts])
    return np.where(places < length - length // 8, ids, 0).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def output_and_gradients(inputs, segments, causal, axes, kernel):
    """The mixed values, and the gradients of their weighted sum over the real positions."""
    *tensors, weights = inputs
    if segments is not None:
        weights = jnp.where((segments > 0)[..., None, None], weights, 0)

    def total(query, key, value):
        if kernel == "splash":
            mixed = splash_attention(query, key, value, segments, causal, axes, interpret=True)
        else:
            mixed = attention(query, key, value, query_segments=segments, causal=causal, kernel="xla", axes=axes)
        return jnp.sum(mixed * weights), mixed

    gradients, mixed = jax.grad(total, (0, 1, 2), has_aux=True)(*tensors)
    return mixed, gradients


def check_against_xla(inputs, segments, causal, axes=LAYOUT, mesh: MeshConfig | None = None):
    """Asserts equal values at all real positions and equal gradients; returns those of splash."""
    expected, slopes = output_and_gradients(inputs, segments, causal, axes, "xla")
    if mesh is None:
        ours, gradients = output_and_gradients(inputs, segments, causal, axes, "splash")
    else:
        with jax.set_mesh(partitioning.make_mesh(mesh)):
            assert splash_obstacle(inputs[0].shape, inputs[1].shape, True, axes) is None
            ours, gradients = output_and_gradients(inputs, segments, causal, axes, "splash")
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    for gradient, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(gradient, slope, atol=1e-4, rtol=1e-4)
    return ours, gradients


def test_blocks_cover_every_length():
    assert [block_grid(length) for length in (64, 576, 784, 1024, 4096)] == [
        (1, 128),
        (1, 640),
        (1, 896),
        (1, 1024),
        (4, 1024),
    ]
    for length in range(1, 5000):
        blocks, block = block_grid(length)
        assert block % 128 == 0
        assert block <= LARGEST_BLOCK
        assert length <= blocks * block < length + 128 * blocks


@pytest.mark.parametrize(("length", "width"), [(576, 72), (1024, 64)])
def test_full_attention_equals_xla(length, width):
    check_against_xla(make_inputs(1, length, 2, 2, width), None, causal=False, axes=TOWER_LAYOUT)


def test_packed_causal_attention_equals_xla():
    check_against_xla(make_inputs(1, 784, 16, 8, 128), packed_segments(1, 784), causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("length", [64, 576, 784, 1024, 1300])
def test_every_size_equals_xla(length, width, causal):
    inputs = make_inputs(2, length, 16, 8, width)
    check_against_xla(inputs, packed_segments(2, length) if causal else None, causal)


def test_padding_is_finite_and_gives_no_gradient():
    inputs, segments = make_inputs(2, 64, 2, 1, 64), packed_segments(2, 64)
    segments[1] = 0
    ours, gradients = check_against_xla(inputs, segments, causal=True)
    assert np.isfinite(ours).all()
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[segments == 0], 0)
        assert np.abs(gradient[segments > 0]).max() > 0.1


MESHES = {
    "rows and heads": (MeshConfig(slice=2, data=2, fsdp=1, tensor=2), 4, 16, 8),
    "pieces of a row": (MeshConfig(fsdp=2, context=4), 2, 2, 1),
    "everything": (MeshConfig(fsdp=2, context=2, tensor=2), 2, 4, 2),
}


@pytest.mark.parametrize(
    "name", ["everything", *(pytest.param(other, marks=pytest.mark.slow) for other in list(MESHES)[:2])]
)
def test_packed_causal_attention_equals_xla_on_a_mesh(name):
    mesh, rows, heads, groups = MESHES[name]
    length = 200 * mesh.context
    check_against_xla(make_inputs(rows, length, heads, groups, 64), packed_segments(rows, length), True, mesh=mesh)


@pytest.mark.parametrize("axes", [pytest.param(LAYOUT, marks=pytest.mark.slow), TOWER_LAYOUT])
def test_full_attention_equals_xla_on_a_mesh(axes):
    inputs = make_inputs(2, 400, 4, 4, 72)
    check_against_xla(inputs, None, False, axes, MeshConfig(fsdp=2, context=2, tensor=2))


DECODER = DecoderConfig(64, 32, 48, 2, 2, 1, 16, rope_theta=1e4)


def decoder_gradients(runtime: RuntimeConfig) -> dict:
    """Gradients of a two-layer decoder's parameters on packed rows of 160 tokens."""
    module, segments = Decoder(DECODER, runtime), packed_segments(2, 160)
    first = np.argmax(segments[:, :, None] == segments[:, None], axis=-1)
    positions = np.arange(160) - first
    embeddings = np.random.default_rng(0).normal(size=(2, 160, DECODER.hidden_size)).astype(np.float32)

    @jax.jit
    def gradients(params):
        hidden = lambda p: module.apply({"params": p}, embeddings, segments, positions)
        return jax.grad(lambda p: jnp.mean(jnp.where(segments[..., None] > 0, hidden(p), 0) ** 2 * embeddings))(params)

    ids, one = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, DECODER.hidden_size))
    abstract, _ = partitioning.unbox(jax.eval_shape(module.init, jax.random.key(0), one, ids, ids)["params"])
    rng = np.random.default_rng(1)
    return gradients(jax.tree.map(lambda leaf: rng.normal(0.5, 0.1, leaf.shape).astype(np.float32), abstract))


@pytest.mark.parametrize(
    "remat", ["attention", *(pytest.param(other, marks=pytest.mark.slow) for other in ("full", "dots", "none"))]
)
def test_the_kernel_lives_in_a_scanned_and_rematerialised_decoder(remat):
    expected = decoder_gradients(RuntimeConfig("float32", "xla", "none"))
    ours = decoder_gradients(RuntimeConfig("float32", "splash_interpreted", remat))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3), rtol=0)
    jax.tree.map(close, ours, expected)


@pytest.fixture(scope="module")
def tpu_mesh() -> jax.sharding.Mesh:
    """Four v5e chips that exist only for the compiler."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, value)
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1)
        )
    return partitioning.make_mesh(MeshConfig(fsdp=2, tensor=2), topology.devices)


def compiled_kernels(mesh: jax.sharding.Mesh, module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[int, int]:
    """Calls of the forward and of the backward kernel in a compiled gradient of `module`."""
    # Nothing may be computed here: the devices exist only for the compiler.
    one_row = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in inputs]
    boxed = jax.eval_shape(module.init, jax.eval_shape(jax.random.key, 0), *one_row)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    whole = partitioning.replicated(mesh)
    params = jax.tree.map(lambda leaf: place(leaf, whole), partitioning.unbox(boxed["params"])[0])
    inputs = [place(x, partitioning.row_sharding(mesh)) for x in inputs]
    with jax.set_mesh(mesh):
        loss = lambda p, *x: jnp.sum(module.apply({"params": p}, *x).astype(jnp.float32))
        text = jax.jit(jax.grad(loss)).lower(params, *inputs).compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and "tpu_custom_call" in line]
    return tuple(sum(name in line for line in calls) for name in ("splash_mha_fwd", "splash_mha_dkv"))


@pytest.mark.slow
@pytest.mark.parametrize("remat", DECODER_REMAT)
def test_the_tpu_compiler_takes_a_decoder(tpu_mesh, remat):
    config = DecoderConfig(512, 512, 1024, 2, 8, 4, 128)
    ids = jax.ShapeDtypeStruct((4, 1536), jnp.int32)
    embeddings = jax.ShapeDtypeStruct((4, 1536, 512), jnp.bfloat16)
    module = Decoder(config, RuntimeConfig(attention="splash", decoder_remat=remat))
    recomputed = remat == "full"
    assert compiled_kernels(tpu_mesh, module, (embeddings, ids, ids)) == (1 + recomputed, 1)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 72])
def test_the_tpu_compiler_takes_a_tower(tpu_mesh, width):
    config = VisionConfig(4 * width, 512, 2, 4, patch_size=16, image_size=448)
    tiles = jax.ShapeDtypeStruct((4, 448, 448, 3), jnp.uint8)
    module = VisionTower(config, RuntimeConfig(attention="splash", tower_remat="layer"))
    assert compiled_kernels(tpu_mesh, module, (tiles,)) == (2, 1)
