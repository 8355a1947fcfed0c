"""timm's models as backbones: the contract for many families, ViTDet's form by its laws, weights by name."""

from __future__ import annotations

import http.server
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from boxwright.models.backbones import from_timm, vitdet_form
from boxwright.models.tensors import Tensors, read_tensors
from boxwright.models.weights import load
from boxwright.testing import assert_is_backbone
from boxwright.types import UserError

timm = from_timm.timm

SHALLOW = {"depth": 2, "global_blocks": (1,), "window": 3}

FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18.a1_in1k": {},
    "convnext_atto": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "mobilevit_xxs": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "swinv2_cr_tiny_ns_224": {"depths": (1, 1, 1, 1)},
    "pvt_v2_b0": {},
    "mambaout_femto": {},
    "fastvit_t8": {},
    "hgnetv2_b0": {},
    "dla34": {},
    "vgg11_bn": {},
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "efficientvit_m0": {},  # strides 16, 32 and 64
    "samvit_base_patch16": {"depth": 2, "global_attn_indexes": (1,), "embed_dim": 96, "num_heads": 3, "img_size": 64},
    "vit_tiny_patch16_224": SHALLOW,
    "deit_tiny_distilled_patch16_224": SHALLOW,
    "deit3_small_patch16_224": SHALLOW,
    "vit_small_patch14_dinov2": SHALLOW,
    "vit_small_patch14_reg4_dinov2": SHALLOW,
    "vit_small_patch16_dinov3": SHALLOW,
    "eva02_tiny_patch14_224": SHALLOW,
    "vit_small_patch16_rope_mixed_224": SHALLOW,
    "vit_base_patch16_siglip_224": {**SHALLOW, "embed_dim": 96, "num_heads": 3},
    "vit_base_patch16_clip_224": {**SHALLOW, "embed_dim": 96, "num_heads": 3},
    "vit_little_patch16_reg4_gap_256": SHALLOW,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_the_contract_of_a_backbone(name: str) -> None:
    torch.manual_seed(0)
    body = from_timm.build(name, **FAMILIES[name])
    assert min(body.channels) >= 4
    assert len(body.mean) == len(body.std) == 3
    assert all(parameter.requires_grad for parameter in body.parameters())
    assert_is_backbone(body)

    with torch.device("meta"):
        again = from_timm.build(name, **FAMILIES[name])
    again.load_state_dict(body.state_dict(), assign=True)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in body.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet5", {}, "Did you mean 'resnet5"),
        ("hf-hub:timm/resnet18", {}, "timm has no model"),
        ("resnet18.a1_in1", {}, "Did you mean 'resnet18.a1_in1k'"),
        ("resnet18", {"patch": 8}, "no plain ViT"),
        ("resnet18", {"norm": "frosen"}, "wanted is train or frozen"),
        ("resnet18", {"pretrained": True}, "takes no option 'pretrained'"),
        ("resnet18", {"drop_path_rate": 0.1}, "say drop_path"),
        ("resnet18", {"colour": 1}, "colour"),
        ("vit_tiny_patch16_224", {"depth": 2, "global_blocks": (2,)}, "has blocks 0 to 1"),
        ("vit_tiny_patch16_224", {"patch": 12}, "a patch of 12"),
        ("maxvit_tiny_tf_224", {}, "does not take pictures of every size"),
        ("coatnet_0_rw_224", {}, "does not take pictures of every size"),
        ("beit_base_patch16_224", {}, "does not take pictures of every size"),
        ("inception_v3", {}, "which no stride of"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_told_in_one_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        from_timm.build(name, **options)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_frozen_body_gets_no_gradient_and_stays_as_in_evaluation() -> None:
    body = from_timm.build("resnet18", frozen=True)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    maps = body.train()(torch.randn(2, 3, 64, 64))
    assert not any(parameter.requires_grad for parameter in body.parameters())
    assert not any(module.training for module in body.modules())
    assert not any(level.requires_grad for level in maps.values())
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


def test_a_frozen_norm_keeps_its_statistics_while_the_rest_learns() -> None:
    body = from_timm.build("resnet18", norm="frozen").train()
    before = {key: value.clone() for key, value in body.state_dict().items() if "bn" in key}
    maps = body(torch.randn(2, 3, 64, 64))
    torch.stack([level.mean() for level in maps.values()]).sum().backward()
    assert before
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items() if "bn" in key)
    assert all(parameter.grad is not None for parameter in body.parameters())


# ------ ViTDet's form

VITS: dict[str, dict[str, Any]] = {  # each a way of positions, prefix tokens and last norm
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_dinov2": {"patch_size": 16, "img_size": 592},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16, "img_size": 592},
    "vit_small_patch16_dinov3": {},
    "eva02_tiny_patch14_224": {"patch_size": 16, "img_size": 256},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_base_patch16_siglip_224": {"embed_dim": 96, "num_heads": 3},
    "vit_base_patch16_clip_224": {"embed_dim": 96, "num_heads": 3},
    "vit_little_patch16_reg4_gap_256": {},
    "vit_base_patch16_rpn_224": {"embed_dim": 96, "num_heads": 3},
}


@pytest.mark.parametrize("name", VITS)
def test_without_windows_it_is_timms_own_function(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=3, **VITS[name]).eval()
    options = {key: value for key, value in VITS[name].items() if key not in ("patch_size", "img_size")}
    body = from_timm.build(name, window=0, depth=3, **options).eval()
    perturb(net)
    account = load(body, net.state_dict(), source=name)
    assert account.used == account.total == len(body.state_dict())

    images = torch.randn(2, 3, 80, 112)
    (expected,) = net.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
    torch.testing.assert_close(body(images)[16], expected, atol=1e-5, rtol=1e-5)


def test_a_parameter_that_no_map_depends_on_is_frozen_and_no_other() -> None:
    """EfficientViM weighs the classifiers of its stages, of which a backbone has none."""
    body = from_timm.build("efficientvim_m1")
    assert [name for name, parameter in body.named_parameters() if not parameter.requires_grad] == ["net.weights"]
    assert_is_backbone(body)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grid", [(6, 9), (5, 7), (4, 2)])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3",
             "vit_small_patch16_rope_mixed_224", "vit_base_patch16_siglip_224"]
)  # fmt: skip
def test_windows_are_global_attention_under_a_mask(name: str, grid: tuple[int, int], fused: bool) -> None:
    """A place sees its window's places and the prefix; the prefix is the mean of what it is in each window."""
    torch.manual_seed(0)
    body: Any = from_timm.build(name, depth=1, embed_dim=96, num_heads=3).eval()
    perturb(body)
    block = body.blocks[0]
    block.attn.fused_attn = fused
    turn = body._rotations(grid)
    turn = turn[0] if body.rope_of_each_block else turn
    prefix = sum(token.shape[1] for token in (body.cls_token, body.reg_token) if token is not None)
    cells, window = grid[0] * grid[1], 3
    x = torch.randn(2, prefix + cells, 96)

    def run(x: Tensor, turn: Tensor | None, **mask: Tensor) -> Tensor:
        return block(x, **mask) if turn is None else block(x, rope=turn, **mask)

    found = vitdet_form.attend_in_windows(run, x, turn, grid, window)

    y, x_ = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    own = (y // window * grid[1] + x_ // window).flatten()  # of each cell, the number of its window
    of_prefix = torch.zeros(2, prefix, 96)
    for number in own.unique():
        inside = own == number  # (T,)
        sees = torch.cat([torch.ones(prefix, dtype=torch.bool), inside]).expand(prefix + cells, -1)
        seen = run(x, turn, attn_mask=sees)  # (2, P + T, 96)
        torch.testing.assert_close(found[:, prefix:][:, inside], seen[:, prefix:][:, inside], atol=1e-5, rtol=1e-5)
        of_prefix += seen[:, :prefix] * inside.sum() / cells
    torch.testing.assert_close(found[:, :prefix], of_prefix, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "window"), [*itertools.product([(6, 9), (5, 7), (2, 4), (1, 1)], [1, 3, 4, 14])])
def test_windows_cut_out_of_a_grid_make_up_the_grid(size: tuple[int, int], window: int) -> None:
    x = torch.randn(2, *size, 5)
    parts = [(r, c) for r in vitdet_form.spans(size[0], window) for c in vitdet_form.spans(size[1], window)]
    pasted = torch.zeros_like(x)
    for rows, columns in parts:
        windows = vitdet_form.cut(x, rows, columns)
        assert windows.shape[2] == rows.window * columns.window <= window**2
        pasted[:, rows.start : rows.stop, columns.start : columns.stop] = vitdet_form.paste(windows, rows, columns)
    assert torch.equal(pasted, x)


def test_a_window_as_large_as_the_grid_is_global_attention() -> None:
    torch.manual_seed(0)
    body: Any = from_timm.build("vit_small_patch16_dinov3", depth=2, global_blocks=(1,)).eval()
    perturb(body)
    images = torch.randn(1, 3, 96, 160)
    body.window = 10
    within = body(images)[16]
    body.window = 0
    torch.testing.assert_close(within, body(images)[16])
    body.window = 4
    assert not torch.allclose(within, body(images)[16], atol=1e-2)


@pytest.mark.parametrize(("depth", "last"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (32, [7, 15, 23, 31])])
def test_global_blocks_end_each_quarter_of_the_depth(depth: int, last: list[int]) -> None:
    assert vitdet_form.quarters(depth) == last


def test_positions_are_the_trained_ones_on_the_trained_grid_and_come_back_from_a_finer_one() -> None:
    body: Any = from_timm.build("vit_tiny_patch16_224", depth=1, class_token=False, global_pool="avg").eval()
    with torch.no_grad():
        ramp = torch.linspace(-1, 1, 14).cumsum(0)
        body.pos_embed.copy_((ramp[:, None] + 2 * ramp)[..., None].expand(14, 14, 192).reshape(1, 196, 192))
        body.patch_embed.proj.weight.zero_()
        body.patch_embed.proj.bias.zero_()
        same, _ = body._embed(torch.zeros(1, 3, 224, 224))
        finer, grid = body._embed(torch.zeros(1, 3, 448, 448))
        body.pos_embed = nn.Parameter(finer)
        body.pretrain_grid = grid
        back, _ = body._embed(torch.zeros(1, 3, 224, 224))
    ramps = (ramp[:, None] + 2 * ramp).flatten()
    assert torch.equal(same[0, :, 0], ramps)
    assert grid == (28, 28)
    torch.testing.assert_close(back[0, :, 0], ramps, atol=0.2, rtol=0)  # of values that span 22


def test_blocks_run_again_for_their_gradients_give_the_same_gradients() -> None:
    images = torch.randn(2, 3, 64, 96)
    gradients: list[list[Tensor]] = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        body = from_timm.build("vit_small_patch16_dinov3", **SHALLOW, checkpoint_blocks=checkpoint_blocks).train()
        body(images)[16].square().mean().backward()
        gradients.append([parameter.grad for parameter in body.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_stochastic_depth_leaves_out_a_whole_picture_in_training_only() -> None:
    torch.manual_seed(0)
    body: Any = from_timm.build("vit_tiny_patch16_224", depth=2, global_blocks=(1,), window=2, drop_path=0.5)
    before, after = torch.zeros(64, 5, 3), torch.ones(64, 5, 3)
    kept = body.train()._drop(before, after, 0.5)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert torch.equal(body.eval()._drop(before, after, 0.5), after)


# ------ Weights


def test_the_whole_model_of_timm_loads_by_name_with_an_account(tmp_path: Path) -> None:
    net = timm.create_model("resnet18", num_classes=10)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    body = from_timm.build("resnet18")
    account = load(body, from_timm.adapt(body, read_tensors(tmp_path / "model.safetensors")), source="model")
    assert account.used == account.total == len(net.state_dict()) - 2
    assert account.unexpected == ("fc.bias", "fc.weight")
    images = torch.randn(1, 3, 64, 64)
    expected = net.eval().forward_intermediates(images, intermediates_only=True)[-1]
    torch.testing.assert_close(body.eval()(images)[32], expected)


def test_frozen_norms_take_the_statistics_of_the_file() -> None:
    net = timm.create_model("resnet18", num_classes=10)
    perturb(net)
    body = from_timm.build("resnet18", norm="frozen")
    account = load(body, from_timm.adapt(body, net.state_dict()), source="model")
    assert account.used == account.total
    images = torch.randn(1, 3, 64, 64)
    expected = net.eval().forward_intermediates(images, intermediates_only=True)[-1]
    torch.testing.assert_close(body.train()(images)[32], expected, atol=1e-4, rtol=1e-4)


def test_a_smaller_patch_and_the_authors_layout_are_adapted_and_told() -> None:
    """DINOv2's own file: patch 14 (here to 16), registers and mask token under the authors' names."""
    net = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, depth=1)
    authors = dict(net.state_dict())
    authors["register_tokens"] = authors.pop("reg_token")
    authors["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), authors["pos_embed"]], dim=1)
    authors["mask_token"] = torch.zeros(1, 384)

    body: Any = from_timm.build("vit_small_patch14_reg4_dinov2", depth=1)
    adapted = from_timm.adapt(body, Tensors(authors, notes=("as read",)))
    account = load(body, adapted, source="dinov2")
    assert account.used == account.total
    assert torch.equal(body.pos_embed, net.pos_embed)  # 37 x 37 cells, as trained
    assert torch.equal(body.reg_token, net.reg_token)
    told = "\n".join(account.notes)
    assert "as read" in told
    assert "patch_embed.proj.weight resampled from (384, 3, 14, 14) to (384, 3, 16, 16)" in told
    assert "mask_token" in told
    assert "reg_token" in told or "register_tokens" in told
    assert "mask_token" in authors  # what was given is as it was


def test_a_table_of_another_size_is_resampled_at_loading_and_told() -> None:
    net = timm.create_model("vit_tiny_patch16_384", depth=1)
    body: Any = from_timm.build("vit_tiny_patch16_224", depth=1)
    account = load(body, from_timm.adapt(body, net.state_dict()), source="384")
    assert account.used == account.total
    assert account.unexpected == ("head.bias", "head.weight")
    assert any("pos_embed resampled from (1, 577, 192) to (1, 197, 192)" in note for note in account.notes)


def test_dinov3s_own_layout_is_adapted() -> None:
    net = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=1)
    authors = {
        name.replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma")
        .replace("reg_token", "storage_tokens"): value
        for name, value in net.state_dict().items()
    }
    authors["rope_embed.periods"] = torch.zeros(16)
    authors["blocks.0.attn.qkv.bias"] = torch.zeros(3 * 384)
    authors["blocks.0.attn.qkv.bias_mask"] = torch.zeros(3 * 384)
    body = from_timm.build("vit_small_patch16_dinov3", depth=1)
    account = load(body, from_timm.adapt(body, authors), source="dinov3")
    assert account.used == account.total
    for name, value in body.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_weights_of_another_model_are_refused() -> None:
    body = from_timm.build("vit_tiny_patch16_224", depth=1)
    with pytest.raises(UserError, match=r"another architecture|no weights of"):
        load(body, from_timm.adapt(body, timm.create_model("resnet18").state_dict()), source="resnet")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Path], None]]:
    """A hub on this machine that has the files that it is given; its cache is empty at first."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", '"0123456789"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    constants = from_timm.huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("BOXWRIGHT_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def publish(repository: str, file: Path) -> None:
        files[f"/{repository}/resolve/main/{file.name}"] = file.read_bytes()

    yield publish
    server.shutdown()
    server.server_close()
    thread.join()


def test_published_weights_come_from_the_hub_once(
    hub: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = timm.create_model("test_resnet")
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    hub("timm/test_resnet.r160_in1k", tmp_path / "model.safetensors")
    tensors, source = from_timm.pretrained("test_resnet")
    assert source == ("timm's test_resnet.r160_in1k (apache-2.0, https://huggingface.co/timm/test_resnet.r160_in1k)")
    body = from_timm.build("test_resnet")
    account = load(body, from_timm.adapt(body, tensors), source=source)
    assert account.used == account.total

    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    again, _ = from_timm.pretrained("test_resnet.r160_in1k")
    assert again.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("name", "offline", "words"),
    [
        ("test_vit.r160_in1k", "1", ["BOXWRIGHT_OFFLINE", "timm/test_vit.r160_in1k", "model.safetensors", "--weights"]),
        ("test_vit.r160_in1k", "", ["huggingface.co/timm/test_vit.r160_in1k", "model.safetensors", "--weights"]),
        ("vit_tiny_patch16_18", "", ["timm has no model", "vit_tiny_patch16_384"]),
        ("darknet17", "", ["publishes no weights of darknet17"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("hub")
def test_weights_that_cannot_be_had_are_told_with_the_ways_out(
    name: str, offline: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", offline)
    with pytest.raises(UserError) as refusal:
        from_timm.pretrained(name)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50.a1_in1k", ("apache-2.0", True)),
        ("vit_base_patch16_224.mae", ("cc-by-nc-4.0", False)),
        ("vit_small_patch16_dinov3", ("dinov3-license", False)),
        ("eva02_tiny_patch14_224", ("mit", True)),
    ],
)
def test_the_licence_of_the_weights_is_known(name: str, expected: tuple[str, bool]) -> None:
    assert from_timm.licence(name) == expected


def perturb(net: nn.Module) -> None:
    """Values for what begins at zero or one, which would hide mistakes."""
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
            tensor.add_(torch.rand_like(tensor) * 0.5)
