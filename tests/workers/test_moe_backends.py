"""The experts' backends: which one a recipe gets, that the layer is the papers' by each, in one piece and in parts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import triton_on_cpu
from small import small_recipe
from torch import Tensor
from triton_on_cpu import DEVICE, ON_GPU

triton_on_cpu.prepare()

from shoal.kernels.moe import oracle, route  # noqa: E402
from shoal.kernels.moe.backend import experts_backend  # noqa: E402
from shoal.kernels.moe.gemms import Gemms  # noqa: E402
from shoal.kernels.moe.triton_gemms import TritonGemms  # noqa: E402
from shoal.workers.config import Recipe  # noqa: E402
from shoal.workers.errors import InvalidInput  # noqa: E402
from shoal.workers.mesh import make_mesh  # noqa: E402
from shoal.workers.model.feedforward import MoE  # noqa: E402
from shoal.workers.model.load import MoELoad  # noqa: E402
from shoal.workers.placement import Placement  # noqa: E402

DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def layer_of(backend: str, dtype: torch.dtype = DTYPE, **changes: Any) -> MoE:
    """A layer with the same weights every time, whatever computes it."""
    recipe = Recipe.model_validate(small_recipe(parallel__device="auto", balance__expert=0.1, **changes))
    # The interpreter runs where the backend itself would be refused: it is put in afterwards.
    name = backend if ON_GPU else "torch"
    changed = recipe.model_copy(update={"moe": recipe.moe.model_copy(update={"backend": name})})
    layer = MoE(changed, make_mesh(Placement.of(recipe)), torch.device(DEVICE), dtype).to(DEVICE, dtype)
    if not ON_GPU and backend == "triton":
        layer.products, layer.whole = TritonGemms, True
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def outcome(layer: MoE, x: Tensor) -> list[Tensor]:
    """Output, counts, balance loss and all gradients."""
    sequences = torch.arange(len(x), device=x.device) // 10, len(x) // 10
    wanted = sequences if layer.balance.sequence else None
    x, load = x.clone().requires_grad_(), MoELoad(len(x), sequences=wanted)
    out = layer(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), load)
    balance = balance_of(layer, load)
    upstream = upstream_of(x)
    grads = torch.autograd.grad((out * upstream).sum() + balance, [x, *layer.parameters()])
    assert load.counts is not None
    return [out.detach(), load.counts[0], balance.detach(), *grads]


def upstream_of(x: Tensor) -> Tensor:
    """A gradient of the output; the same numbers on every device."""
    return torch.linspace(-1, 1, x.numel()).view_as(x).to(x)


def balance_of(layer: MoE, load: MoELoad) -> Tensor:
    """The loss of a pass of that layer alone."""
    load.finish(layer.mesh.world, layer.mesh.dispatch)
    loss = load.loss(layer.balance)
    assert loss is not None
    return loss


def by_the_equations(layer: MoE, x: Tensor) -> list[Tensor]:
    """What :func:`outcome` gives, token by token in float64."""
    moe, balance = layer.table, layer.balance
    weights = {name: p.detach().cpu().double().requires_grad_() for name, p in layer.named_parameters()}
    u = x.cpu().double().requires_grad_()
    shared = list(zip(weights["shared.gate_up"], weights["shared.down"], strict=True))
    centroids, up, down = (weights[name] for name in ("centroids", "experts.gate_up", "experts.down"))
    out, scores, counts = oracle.moe_layer(u, centroids, up, down, shared, moe.top_k, moe.normalize_gates)
    loss = oracle.expert_balance(scores, counts, moe.top_k, balance.expert)
    loss = loss + oracle.device_balance(scores, counts, moe.top_k, balance.device, balance.device_groups)
    total = (out * upstream_of(x).cpu().double()).sum() + loss
    return [out.detach(), counts, loss.detach(), *torch.autograd.grad(total, [u, *weights.values()])]


WIDE: dict[str, Any] = {"model__hidden": 64, "moe__experts": 16, "moe__expert_hidden": 32}
FAVOURITE, IDLE = 5, (3, 8, 15)
LOADS: dict[str, dict[str, Any]] = {
    "any": {},
    "experts without tokens": {},
    "an expert with 30 % of all rows, others with none": {"moe__normalize_gates": True},
}
KINDS = {"torch": ("Gemms",), "triton": ("TritonGemms", "GluonGemms"), "megablocks": ("MegaBlocksGemms",)}
"""Classes of products; Gluon's are those of Triton on Hopper."""
COMPUTED_BY = [
    pytest.param("torch", torch.bfloat16, id="torch"),
    pytest.param(
        *("torch", torch.float32),
        marks=pytest.mark.skipif(ON_GPU, reason="takes bfloat16 there"),
        id="torch in float32",
    ),
    pytest.param("triton", DTYPE, id="triton"),
    pytest.param("megablocks", torch.bfloat16, marks=pytest.mark.gpu, id="megablocks"),
]


@torch.no_grad()
def loaded(layer: MoE, load: str) -> Tensor:
    """Tokens ``[T, hidden]`` for a layer, whose router is changed so that its experts have that load."""
    tokens, centroids = 400 if ON_GPU else 100, layer.centroids
    x = torch.randn(tokens, centroids.shape[1], generator=torch.Generator().manual_seed(2))
    x[:, 0] = 2.0
    x[:, 1] = torch.where(torch.arange(tokens) % 10 == 0, -2.0, 2.0)
    centroids.mul_(0.3)  # logits of 0.8 or so
    if load != "any":
        centroids[list(IDLE)] = 0.0
        centroids[list(IDLE), 0] = -4.0
    if "30 %" in load:  # nine tokens of ten choose it, among three experts each
        centroids[:, 1] = 0.0
        centroids[FAVOURITE] = 0.0
        centroids[FAVOURITE, 1] = 1.5
    return x.to(centroids)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("backend", "dtype"), COMPUTED_BY)
def test_each_backend_computes_the_layer_of_the_papers(backend: str, dtype: torch.dtype, load: str) -> None:
    """Output, loads, balance losses and all gradients."""
    if backend == "megablocks" and not find_spec("megablocks"):
        pytest.skip("MegaBlocks is not installed: make megablocks builds it")
    layer = layer_of(backend, dtype, **WIDE, **LOADS[load])
    assert layer.whole == (backend == "triton")
    assert layer.products.__name__ in KINDS[backend]
    x = loaded(layer, load)
    got, want = outcome(layer, x), by_the_equations(layer, x)
    counts = want[1].tolist()
    assert got[1].tolist() == counts
    names = ["out", "counts", "balance", "x", *(name for name, _ in layer.named_parameters())]
    for name, one, other in zip(names, got, want, strict=True):
        assert one.shape == other.shape, name
        error = (one.cpu().double() - other).norm() / other.double().norm()
        # bf16: four roundings on the way, and 5.4e-3 at most where PyTorch computes it on a CPU
        assert error <= (1.5e-2 if dtype == torch.bfloat16 else 3e-6), (name, float(error))
    if load != "any":
        assert [counts[expert] for expert in IDLE] == [0, 0, 0]
        for name in ("experts.gate_up", "experts.down"):
            grad = got[names.index(name)]
            assert [bool(expert.any()) for expert in grad] == [count > 0 for count in counts]
    if "30 %" in load:
        assert 10 * counts[FAVOURITE] == 3 * sum(counts)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_triton_agrees_with_torch(normalize: bool, shared: int) -> None:
    changes: dict[str, Any] = {"moe__normalize_gates": normalize, "moe__shared_experts": shared}
    ours, theirs = layer_of("triton", **changes), layer_of("torch", **changes)
    assert ours.whole and not theirs.whole
    x = torch.randn(50, theirs.centroids.shape[1], generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
    for got, want in zip(outcome(ours, x), outcome(theirs, x), strict=True):
        assert got.dtype == want.dtype
        got, want = got.double(), want.double()
        assert (got - want).norm() <= (2e-2 if ON_GPU else 3e-6) * want.norm()


BALANCED = {"balance__sequence": 0.2, "balance__z_loss": 0.1, "balance__bias_rate": 0.01, "route__max_devices": 2}


SIGMOID = BALANCED | {"moe__router": "sigmoid", "moe__normalize_gates": True, "balance__z_loss": 0.0}


@pytest.mark.parametrize("changes", [pytest.param(BALANCED, id="softmax"), pytest.param(SIGMOID, id="sigmoid")])
def test_triton_agrees_with_torch_on_all_that_balances(changes: dict[str, Any]) -> None:
    """The layer in one piece, and its parts as ranks use them."""
    kinds = {name: layer_of(name.split()[0], **changes) for name in ("triton", "triton in parts", "torch")}
    kinds["triton in parts"].whole = False
    kinds["triton in parts"].dispatcher.triton = True
    x = torch.randn(50, kinds["torch"].centroids.shape[1], generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
    bias = torch.linspace(-0.3, 0.3, 8, device=DEVICE)
    found = {}
    for name, layer in kinds.items():
        assert layer.bias is not None
        layer.bias.copy_(bias)
        found[name] = [t.double() for t in outcome(layer, x)]
        with torch.no_grad():  # as the first time of a layer that is computed again
            load = MoELoad(len(x), sequences=(torch.arange(50, device=x.device) // 10, 5))
            layer(x, torch.zeros(50, dtype=torch.int64, device=x.device), load)
        assert torch.equal(balance_of(layer, load).double(), found[name][2])
    for name in ("triton", "triton in parts"):
        for got, want in zip(found[name], found["torch"], strict=True):
            assert (got - want).norm() <= (2e-2 if ON_GPU else 3e-6) * want.norm()


@pytest.mark.skipif(ON_GPU, reason="a GPU's grouped products are not ours to vouch for")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["triton", "triton in parts", "torch"])
def test_what_is_not_finite_stays_with_the_tokens_and_experts_that_meet_it(name: str, bad: float) -> None:
    """A weight of one expert, then one token: all others have the bits that they had without."""
    layer, quiet = layer_of(name.split()[0]), layer_of(name.split()[0])
    for each in (layer, quiet) if name == "triton in parts" else ():
        each.whole, each.dispatcher.triton = False, True
    x = torch.randn(24, layer.centroids.shape[1], generator=torch.Generator().manual_seed(2)).to(DTYPE)
    chose = torch.zeros(24, 8, dtype=torch.bool).scatter_(1, route(x, layer.centroids, 3).experts, True)
    experts = [name for name, _ in layer.named_parameters()].index("experts.gate_up") + 1

    def check(hit: Tensor, spoilt: Tensor, found: list[Tensor], wanted: list[Tensor]) -> None:
        """hit: tokens; spoilt: experts."""
        assert not found[0][hit].isfinite().all()
        for got, want in zip(found[:2], wanted[:2], strict=True):
            assert torch.equal(got[~hit], want[~hit])
        for got, want in zip(found[2:], wanted[2:], strict=True):
            assert torch.equal(got[~spoilt], want[~spoilt])

    def all_of(layer: MoE, x: Tensor) -> list[Tensor]:
        out, _, _, *grads = outcome(layer, x)
        return [out, grads[0], *grads[experts : experts + 2]]

    layer.balance = quiet.balance.model_copy(update={"expert": 1e-30, "device": 0.0})
    quiet.balance = layer.balance
    wanted = all_of(quiet, x)
    with torch.no_grad():
        layer.experts.down[2, 0, 0] = layer.experts.gate_up[2, 3, 1] = bad
    check(chose[:, 2], torch.arange(8) == 2, all_of(layer, x), wanted)
    spoilt = x.clone()
    spoilt[7] = bad
    found = all_of(quiet, spoilt)
    met = ~torch.stack([grad.isfinite().flatten(1).all(1) for grad in found[2:]]).all(0)
    assert int(met.sum()) == 3, "a token that is not a number chooses as many experts as any other"
    check(torch.arange(24) == 7, met | chose[7], found, wanted)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's grouped products take no float64")
@pytest.mark.parametrize("sigmoid", [False, True])
def test_losses_of_a_layer_are_those_of_the_papers(sigmoid: bool) -> None:
    layer = layer_of("torch", **(SIGMOID if sigmoid else BALANCED)).double()
    assert layer.bias is not None
    layer.bias.copy_(torch.linspace(-0.3, 0.3, 8))
    x = torch.randn(50, layer.centroids.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, centroids = x.to(DEVICE), layer.centroids.double()
    scores = torch.sigmoid(x @ centroids.T) if sigmoid else torch.softmax(x @ centroids.T, -1)
    wanted = (scores + layer.bias).tolist()
    scores = scores / scores.sum(-1, keepdim=True)
    experts = torch.tensor([oracle.choose(row, 3, groups=4, most=2) for row in wanted])
    counts = torch.bincount(experts.flatten(), minlength=8)
    rows = [range(i, i + 10) for i in range(0, 50, 10)]
    want = (
        oracle.sequence_balance(scores.cpu(), experts, rows, 0.2)
        + oracle.router_z(x, centroids, 0.0 if sigmoid else 0.1).cpu()
    )
    want = want + oracle.expert_balance(scores, counts, 3, 0.1).cpu()
    want = want + oracle.device_balance(scores, counts, 3, 0.05, 4).cpu()
    _, got_counts, got, *_ = outcome(layer, x)
    assert got_counts.tolist() == counts.tolist()
    torch.testing.assert_close(got.cpu(), want.detach(), rtol=1e-9, atol=0)


def test_a_bias_evens_the_load() -> None:
    layer = layer_of("torch", balance__bias_rate=0.002)
    assert layer.bias is not None
    generator = torch.Generator().manual_seed(3)
    x = ((torch.randn(2000, layer.centroids.shape[1], generator=generator) + 1.0) * 0.3).to(DEVICE, DTYPE)
    spread = []
    for _ in range(200):
        counts = torch.bincount(route(x, layer.centroids, 3, bias=layer.bias).experts.flatten(), minlength=8)
        spread.append(float(counts.max() / counts.double().mean()))
        layer.nudge(counts)
    assert spread[0] > 1.5
    assert max(spread[-5:]) < 1.15


def test_auto_is_torch_without_a_gpu_and_where_it_is_not_bfloat16() -> None:
    assert experts_backend("auto", torch.device("cpu"), torch.bfloat16) is Gemms
    assert experts_backend("auto", torch.device("cuda"), torch.float32) is Gemms
    assert experts_backend("torch", torch.device("cuda"), torch.bfloat16) is Gemms


def test_what_a_machine_cannot_do_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"moe\.backend='triton' needs bfloat16 on a GPU.*set it to 'auto'"):
        experts_backend("triton", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"moe\.backend='triton' needs a GPU.*set moe\.backend='auto'"):
        Recipe.model_validate(small_recipe(moe__backend="triton", parallel__device="cpu"))
    if not find_spec("megablocks"):
        recipe = Recipe.model_validate(small_recipe(moe__backend="megablocks", parallel__device="auto"))
        with pytest.raises(InvalidInput, match="make megablocks"):
            MoE(recipe, make_mesh(Placement.of(recipe)), torch.device("cpu"))
