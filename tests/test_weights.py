"""Published weights in and out: equality with transformers' own V-JEPA 2, round trips, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SCRIPT, SMALL, V, small_config
from training import new_model, new_state

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

sys.path.insert(0, str(ROOT / "tools"))
import export_hf  # noqa: E402

# 4 x 4 patches of 8 pixels, as conftest's SMALL, but a predictor with heads and ratio of its own
PUBLISHED = dict(
    patch_size=8,
    crop_size=32,
    frames_per_clip=12,
    hidden_size=48,
    num_attention_heads=4,
    num_hidden_layers=2,
    pred_hidden_size=24,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=2,
    pred_mlp_ratio=2.0,
)
FITS = dict(pred_heads=2, pred_mlp_ratio=2.0, soon_start="mask", num_heads=4, **V.VJepaAutoV2Config.BEFORE)
EQUAL = 1e-5  # fp32: two orders of the same sums, at outputs of about 1


def published_model(**changes):
    """transformers' V-JEPA 2 with weights large enough for attention to matter, one mask token trained."""
    torch.manual_seed(0)
    model = transformers.VJEPA2Model(transformers.VJEPA2Config(**{**PUBLISHED, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "mask_tokens" in name:
            parameter.data.zero_()[0].normal_()
        elif parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(model, its folder), both left as they are by every test."""
    folder, model = tmp_path_factory.mktemp("published") / "hf", published_model()
    model.save_pretrained(folder)
    return model, folder


def official(model):
    """Weights of transformers' model under the names of V-JEPA 2's own code -> (encoder, predictor)."""
    encoder, predictor = {}, {}
    state = model.state_dict()
    for side, prefix, depth in (("encoder", "", 2), ("predictor", "predictor_", 2)):
        found = encoder if side == "encoder" else predictor
        for i in range(depth):
            old, new = f"{side}.layer.{i}.", f"{prefix}blocks.{i}."
            for kind in ("weight", "bias"):
                parts = [state[f"{old}attention.{name}.{kind}"] for name in ("query", "key", "value")]
                found[f"{new}attn.qkv.{kind}"] = torch.cat(parts)
                found[f"{new}attn.proj.{kind}"] = state[f"{old}attention.proj.{kind}"]
                for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                    found[f"{new}{name}.{kind}"] = state[f"{old}{name}.{kind}"]
    for kind in ("weight", "bias"):
        encoder[f"patch_embed.proj.{kind}"] = state[f"encoder.embeddings.patch_embeddings.proj.{kind}"]
        encoder[f"norm.{kind}"] = state[f"encoder.layernorm.{kind}"]
        predictor[f"predictor_embed.{kind}"] = state[f"predictor.embeddings.predictor_embeddings.{kind}"]
        predictor[f"predictor_norm.{kind}"] = state[f"predictor.layernorm.{kind}"]
        predictor[f"predictor_proj.{kind}"] = state[f"predictor.proj.{kind}"]
    for number, token in enumerate(state["predictor.embeddings.mask_tokens"]):
        predictor[f"mask_tokens.{number}"] = token
    return encoder, predictor


def write_pt(path, model, change=None, **entries):
    """An official .pt: target_encoder of the model, encoder half of it, what a training run keeps beside them."""
    encoder, predictor = official(model)
    wrapped = {f"module.backbone.{name}": value for name, value in encoder.items()}
    state = {
        "encoder": {name: value / 2 for name, value in wrapped.items()},
        "predictor": {f"module.backbone.{name}": value for name, value in predictor.items()},
        "opt": {"state": {}, "param_groups": []},
        "scaler": None,
        "target_encoder": {**wrapped, "module.backbone.pos_embed": torch.zeros(1, 96, 48)},
        "epoch": 3,
        "loss": 0.5,
    } | entries
    if change:
        change(state)
    torch.save(state, path)
    return path


def loaded(source, said=None, **changes):
    """A model that has taken in weights -> VJepaAutoV2. `said` gets the lines."""
    cfg = small_config(init_from=str(source), **{**FITS, **changes})
    V.validate_config(cfg)
    model = new_model(cfg, seed=3).eval()
    V.take_weights(model, cfg, [].append if said is None else said.append)
    return model


def copy_folder(folder, target, config=None, tensors=None):
    """A folder of weights with changes: config entries (None: dropped), tensors by name -> target."""
    target.mkdir()
    values = {**json.loads((folder / "config.json").read_text()), **(config or {})}
    (target / "config.json").write_text(
        json.dumps({name: value for name, value in values.items() if value is not None})
    )
    held = safetensors_torch.load_file(folder / "model.safetensors") | (tensors or {})
    held = {name: value.contiguous() for name, value in held.items() if value is not None}
    safetensors_torch.save_file(held, target / "model.safetensors", {"format": "pt"})
    return target


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def clip_of(num=2, frames=12, height=32, width=32, seed=1):
    return torch.randn(num, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


# -- equality


@torch.no_grad()
def test_encoder_equals_that_of_transformers(published):
    """A whole clip, NOW alone, and kept tokens alone. Seen red with sincos positions, with 2 heads for 4, and with key
    and value exchanged."""
    model, folder = published
    ours, clip = loaded(folder), clip_of()
    theirs = model(pixel_values_videos=clip, skip_predictor=True).last_hidden_state
    assert (ours.online(clip) - theirs).abs().max() < EQUAL and theirs.std() > 0.5
    assert torch.equal(ours.online(clip), ours.target(clip))
    now = model(pixel_values_videos=clip[:, : ours.cfg.now_frames], skip_predictor=True).last_hidden_state
    assert (ours.now_context(clip) - now).abs().max() < EQUAL
    keep_idx = torch.stack([torch.randperm(ours.cfg.num_tokens)[:40].sort()[0] for _ in range(2)])
    x = V.gather_tokens(model.encoder.embeddings(clip), keep_idx)
    for layer in model.encoder.layer:
        x = layer(x, keep_idx)[0]
    kept = ours.online.encode(ours.online.tokenizer.cut(clip), keep_idx)
    assert (kept - model.encoder.layernorm(x)).abs().max() < EQUAL


@torch.no_grad()
def test_predictor_equals_that_of_transformers(published):
    """Both mask families and SOON, from the mask token that learned. Seen red with soon_start last, and with the token
    that transformers takes by default, which nobody trained."""
    model, folder = published
    ours, clip = loaded(folder), clip_of()
    tokens, cfg = ours.online(clip), ours.cfg
    order = torch.stack([torch.randperm(cfg.num_tokens) for _ in range(2)])
    now, soon = (idx.expand(2, -1) for idx in (ours.now_idx, ours.soon_idx))
    default = model.predictor.embeddings.mask_tokens.data[1]
    default.copy_(model.predictor.embeddings.mask_tokens.data[0])
    for family, keep_idx, mask_idx in (
        (0, order[:, :40], order[:, 40:70]),
        (1, order[:, :9], order[:, 9:]),
        (2, now, soon),
    ):
        keep_idx = keep_idx.sort(1)[0]
        here = ours.predictor(V.gather_tokens(tokens, keep_idx), keep_idx, mask_idx, family)
        there = model.predictor(tokens, [keep_idx], [mask_idx]).last_hidden_state
        assert (here - there).abs().max() < EQUAL and there.std() > 0.1
    default.zero_()


@torch.no_grad()
def test_loaded_encoder_takes_any_length_and_size(published):
    """Position tables come from the clip, not from the config: a model made for that size gives the same. Seen red with
    the tables of the config's grid."""
    model, folder = published
    encoder = V.load_encoder(folder)
    assert encoder.cfg.grid == (6, 4, 4) and not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for frames, side in ((12, 32), (4, 32), (20, 32), (12, 48), (4, 24)):
        other = transformers.VJEPA2Model(transformers.VJEPA2Config(**{**PUBLISHED, "crop_size": side})).eval()
        other.load_state_dict(model.state_dict())
        clip = clip_of(1, frames, side, side)
        theirs = other(pixel_values_videos=clip, skip_predictor=True).last_hidden_state
        assert (encoder(clip) - theirs).abs().max() < EQUAL
    wide = V.Encoder(small_config(image_size=(16, 48), pos_embed="rope"))
    wide.load_state_dict(encoder.state_dict())
    clip = clip_of(1, 12, 16, 48)
    assert torch.equal(encoder(clip), wide(clip)) and torch.equal(encoder(clip_of()), encoder(clip_of()))
    with pytest.raises(V.UsageError, match="12 x 30 x 32"):
        encoder(clip_of(1, 12, 30, 32))


def test_positions_made_in_inference_mode_serve_training():
    """A look at a clip of another size must not make tables that autograd refuses."""
    encoder, clip = V.Encoder(small_config(pos_embed="rope")), clip_of(1, 12, 16, 16)
    with torch.inference_mode():
        encoder(clip)
    encoder(clip).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.state_dict().keys() == V.Encoder(small_config()).state_dict().keys()


def test_rope21_is_paired_and_spans_the_grid_of_its_pretraining():
    """One frequency per channel pair; rows and columns run from 0 to 15 on every grid, tubelets by ones: written out
    anew. tests of equality with V-JEPA 2.1's own code are in docs/weights.md."""
    code, hd = V.PositionCode("rope21", (3, 2, 5), 48, 2), 24
    token = 1 * 10 + 1 * 5 + 3  # t 1, h 1 of 2, w 3 of 5
    at = [1.0, 15.0, 3 * 15 / 4]
    angles = [place / 10000 ** (pair / 4) for place in at for pair in range(4) for _ in range(2)]
    assert len(angles) == hd
    assert torch.allclose(code.cos[token], torch.tensor(angles, dtype=torch.float64).cos().float(), atol=1e-6)
    assert torch.allclose(code.sin[token], torch.tensor(angles, dtype=torch.float64).sin().float(), atol=1e-6)


# -- where weights come from


def test_all_forms_give_the_same_weights(published, tmp_path):
    """Shards, a classification folder, an official .pt, and one without a predictor."""
    model, folder = published
    wanted = state_of(loaded(folder).online)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    config = transformers.VJEPA2Config(**PUBLISHED, num_pooler_layers=1, num_labels=2)
    classifier = transformers.VJEPA2ForVideoClassification(config)
    classifier.vjepa2.load_state_dict(model.state_dict())
    classifier.save_pretrained(tmp_path / "classes")
    torch.save({"ema_encoder": official(model)[0]}, tmp_path / "alone.pt")
    said = []
    for source in ("shards", "classes", "alone.pt", write_pt(tmp_path / "official.pt", model)):
        ours = loaded(tmp_path / source, said, num_heads=4)
        assert same(state_of(ours.online), wanted) and same(state_of(ours.target), wanted)
    text = "\n".join(said)
    assert "pooler (a classifier's)" in text and "pos_embed (rope needs none)" in text
    assert "target_encoder" in text and "predictor starts anew: there is none" in text


def test_init_key_chooses_the_entry(published, tmp_path):
    """encoder instead of target_encoder; an entry that is not there is refused with those that are."""
    model, path = published[0], tmp_path / "official.pt"
    write_pt(path, model)
    half = V.load_encoder(path, "encoder", num_heads=4)
    assert torch.equal(half.trunk.norm.weight, model.encoder.layernorm.weight / 2)
    with pytest.raises(V.UsageError, match="no entry ema_encoder; there are target_encoder, encoder"):
        loaded(path, init_key="ema_encoder")


def test_half_precision_is_read_as_fp32(published, tmp_path):
    """Folders in bf16, as many are published."""
    model, folder = published
    tensors = {
        name: value.bfloat16() for name, value in safetensors_torch.load_file(folder / "model.safetensors").items()
    }
    encoder = V.load_encoder(copy_folder(folder, tmp_path / "bf16", None, tensors))
    assert encoder.trunk.norm.weight.dtype == torch.float32
    assert torch.equal(encoder.trunk.norm.weight, model.encoder.layernorm.weight.bfloat16().float())


@torch.no_grad()
def test_vjepa21_encoder_is_taken_its_predictor_is_not(published, tmp_path):
    """video_mod_embed is folded into the tokenizer, the last of norms_block is the trunk's, and positions are of the
    2.1 form. The predictor's own video_mod_embed, of another width, must not get in."""
    encoder = official(published[0])[0]
    last = {f"norms_block.3.{kind}": encoder.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    others = {f"norms_block.{n}.{kind}": torch.ones(48) for n in range(3) for kind in ("weight", "bias")}
    mode = torch.randn(1, 1, 48)
    extra = {"video_mod_embed": mode, "img_mod_embed": mode, "patch_embed_img.proj.weight": torch.zeros(48, 3, 1, 8, 8)}
    predictor = {"predictor_embed.0.weight": torch.zeros(24, 48), "video_mod_embed": torch.ones(1, 1, 24)}
    torch.save({"ema_encoder": {**encoder, **last, **others, **extra}, "predictor": predictor}, tmp_path / "v21.pt")
    said = []
    ours = loaded(tmp_path / "v21.pt", said)
    assert ours.cfg.pos_embed == ours.online.position.kind == ours.predictor.position.kind == "rope21"
    assert torch.equal(ours.online.tokenizer.proj.bias, encoder["patch_embed.proj.bias"] + mode.flatten())
    assert torch.equal(ours.target.trunk.norm.weight, last["norms_block.3.weight"])
    text = "\n".join(said)
    assert "V-JEPA 2.1, official .pt, ema_encoder" in text and "that of V-JEPA 2.1 has other shapes" in text
    assert "norms_block (norms at other depths)" in text and "img_mod_embed (for single pictures)" in text


def test_action_conditioned_checkpoint_gives_its_encoder_alone(published, tmp_path):
    """Its predictor is of another kind, and the log says so."""
    model, said = published[0], []
    _, predictor = official(model)
    predictor |= {f"{name}_encoder.weight": torch.zeros(4, 4) for name in ("action", "state", "extrinsics")}
    path = write_pt(tmp_path / "ac.pt", model, predictor=predictor)
    ours, fresh = loaded(path, said), new_model(small_config(**FITS), seed=3)
    assert same(state_of(ours.predictor), state_of(fresh.predictor))
    assert torch.equal(ours.online.trunk.norm.weight, model.encoder.layernorm.weight)
    assert any("predictor starts anew: it is conditioned on actions" in line for line in said)


def test_own_checkpoint_gives_its_encoder(tmp_path):
    """Target by default, online by --init_key, positions as it has them, on another grid; heads from its config."""
    torch.manual_seed(5)
    trained = new_model(small_config(num_heads=2, pos_embed="rope"), seed=5)
    trained.online.trunk.norm.weight.data.fill_(3.0)
    torch.save(new_state(trained), tmp_path / "ckpt.pt")
    said = []
    ours = loaded(tmp_path / "ckpt.pt", said, num_heads=2, image_size=(32, 48), init_key="online")
    assert same(state_of(ours.online), state_of(trained.online)) and same(
        state_of(ours.target), state_of(trained.online)
    )
    assert ours.cfg.pos_embed == "rope" and "of a run the encoder alone is taken" in " ".join(said)
    assert same(state_of(V.load_encoder(tmp_path / "ckpt.pt")), state_of(trained.target))
    with pytest.raises(V.UsageError, match="num_heads = 4, the weights have 2"):
        loaded(tmp_path / "ckpt.pt")
    torch.save(new_state(new_model(small_config())), tmp_path / "sincos.pt")
    assert loaded(tmp_path / "sincos.pt", pos_embed="rope").online.position.kind == "sincos"


def test_predictor_starts_anew_where_it_does_not_fit(published):
    """All of it or nothing, with the flags that would make it fit."""
    said = []
    ours, fresh = loaded(published[1], said, pred_heads=4, pred_mlp_ratio=4.0), new_model(small_config(), seed=3)
    assert same(state_of(ours.predictor), state_of(fresh.predictor))
    text = " ".join(said)
    assert "pred_heads = 4, the weights have 2 (--pred_heads)" in text and "--pred_mlp_ratio" in text
    loaded(published[1], said := [], soon_start="last", pred_attention="cross", num_frames=76, eventually_frames=68)
    text = " ".join(said)
    frozen = new_model(small_config(**{**FITS, "enc_dim": 24, "teacher": "frozen", "init_from": str(published[1])}))
    frozen.take_weights((said := []).append)  # seen red: "fits in part only"
    assert "predictor starts anew: enc_dim = 24, the weights have 48" in " ".join(said)
    assert (
        "--soon_start mask" in text
        and "--pred_attention full" in text
        and "a clip has 76 frames, the weights saw at most 12" in text
    )


def test_a_predictor_that_lacks_a_tensor_is_an_error(published, tmp_path):
    """Its sizes fit, so the file is damaged or of another code: nothing of it is loaded, and only --allow_partial goes
    on. One of other parts starts anew."""
    less = copy_folder(published[1], tmp_path / "less", None, {"predictor.layer.1.norm1.bias": None})
    with pytest.raises(V.UsageError, match="predictor fits in part only: no predictor_blocks.1.norm1.bias"):
        loaded(less)
    ours, fresh = loaded(less, said := [], allow_partial=True), new_model(small_config(**FITS), seed=3)
    assert same(state_of(ours.predictor), state_of(fresh.predictor)) and "starts anew: no predictor_blocks" in said[2]
    path = write_pt(tmp_path / "a.pt", published[0], predictor={"predictor_embed.0.weight": torch.zeros(24, 48)})
    assert loaded(path, said := []) and "predictor starts anew: there is none" in said[2]


# -- refusals


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_config_json_that_cannot_be_read_is_named(published, tmp_path, content):
    """Seen red: it was called a model of type None."""
    folder = copy_folder(published[1], tmp_path / "other")
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    with pytest.raises(V.UsageError, match=r"other: no config.json that can be read \(--init_from\)"):
        loaded(folder)


def test_sizes_that_do_not_fit_are_named(published):
    """Width, depth, heads, patch and tubelet, each with its flag; a preset where one fits."""
    changes = dict(enc_dim=96, enc_depth=3, num_heads=2, mlp_ratio=3.0, patch=4, tubelet_t=1)
    with pytest.raises(V.UsageError) as caught:
        loaded(published[1], pred_dim=48, **changes)
    for name, value in changes.items():
        assert f"{name} = {value}, the weights have" in str(caught.value) and f"(--{name})" in str(caught.value)


def test_heads_of_a_pt_come_from_its_width(published, tmp_path):
    """A width that nobody published needs --num_heads; one that is known settles it. Heads alone pass a strict load."""
    path = write_pt(tmp_path / "official.pt", published[0])
    with pytest.raises(V.UsageError, match="width of 48 with an unknown number of heads"):
        loaded(path, num_heads=12, pred_dim=24)
    with pytest.raises(V.UsageError, match="num_heads"):
        V.load_encoder(path)
    tensors = official(published_model(hidden_size=192, num_attention_heads=3))[0]
    torch.save({"encoder": tensors}, tmp_path / "known.pt")
    assert V.load_encoder(tmp_path / "known.pt").cfg.num_heads == 3
    with pytest.raises(V.UsageError, match="num_heads = 4, the weights have 3"):
        loaded(tmp_path / "known.pt", enc_dim=192)


def test_partial_encoders_are_refused_unless_allowed(published, tmp_path):
    """A tensor missing, one too much, a block fewer: named, and taken with --allow_partial."""
    folder = published[1]
    less = copy_folder(folder, tmp_path / "less", None, {"encoder.layer.1.mlp.fc2.bias": None})
    with pytest.raises(V.UsageError, match=r"in part only: no blocks.1.mlp.fc2.bias \(--allow_partial\)"):
        loaded(less)
    with pytest.raises(V.UsageError, match="in part only: no blocks.1.mlp.fc2.bias"):
        V.load_encoder(less)
    more = copy_folder(folder, tmp_path / "more", None, {"encoder.layer.1.gamma": torch.ones(48)})
    with pytest.raises(V.UsageError, match="no place for blocks.1.gamma"):
        loaded(more)
    with pytest.raises(V.UsageError, match="enc_depth = 3"):
        loaded(folder, enc_depth=3)
    said = []
    ours = loaded(folder, said, enc_depth=3, allow_partial=True)
    assert "in part: no blocks.2" in " ".join(said)
    assert torch.equal(ours.online.trunk.norm.weight, published[0].encoder.layernorm.weight)
    assert same(state_of(ours.online), state_of(ours.target))


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(model_type="dinov2"), "model_type = 'dinov2' in its config.json, only vjepa2"),
        (dict(model_type=None), "model_type = None"),
        (dict(hidden_act="silu"), "hidden_act = 'silu'"),
        (dict(layer_norm_eps=1e-5), "layer_norm_eps = 1e-05"),
        (dict(qkv_bias=False), "qkv_bias = False"),
        (dict(num_attention_heads=7), "a width of 48 with 7 heads"),
        (dict(num_attention_heads="x"), "num_attention_heads in its config.json is no number above 0"),
        (dict(num_attention_heads=2), "num_heads = 4, the weights have 2"),
    ],
)
def test_another_config_is_refused(published, tmp_path, config, message):
    """What a strict load of the tensors would let pass."""
    with pytest.raises(V.UsageError) as caught:
        loaded(copy_folder(published[1], tmp_path / "other", config))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_header(path):
    content = bytearray(path.read_bytes())
    content[9] ^= 0x40
    path.write_bytes(bytes(content))


def huge_header(path):
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def pointer(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "cut, damaged"),
        (flip_header, "cut, damaged"),
        (huge_header, "cut, damaged"),
        (pointer, "git lfs pointer"),
        (lambda path: path.unlink(), "lacks model.safetensors"),
        (lambda path: path.write_bytes(b""), "cut, damaged"),
    ],
)
def test_damaged_files_are_refused(published, tmp_path, damage, message):
    """One line that names the file, for folders of any model."""
    folder = copy_folder(published[1], tmp_path / "hf")
    damage(folder / "model.safetensors")
    for read in (V.check_weights, V.read_weights):
        with pytest.raises(V.UsageError) as caught:
            read(folder)
        assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(published, tmp_path, value):
    """Named by tensor; a run would end in NaN at its first step."""
    tensors = {"encoder.layernorm.bias": torch.full((48,), value)}
    with pytest.raises(V.UsageError, match="encoder.layernorm.bias holds NaN"):
        V.check_weights(copy_folder(published[1], tmp_path / "hf", None, tensors))
    path = write_pt(
        tmp_path / "a.pt", published[0], lambda state: state["predictor"].update({"predictor_norm.bias": value})
    )
    with pytest.raises(V.UsageError, match="predictor_norm.bias is a float, not a tensor"):
        V.read_weights(path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", 3])
def test_shards_outside_the_folder_are_refused(published, tmp_path, shard):
    """An index is foreign text: it names files of its folder and nothing else."""
    folder = copy_folder(published[1], tmp_path / "hf")
    index = {"weight_map": {"encoder.layernorm.bias": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(V.UsageError, match="no file of that folder|it lacks 3"):
        V.check_weights(folder)


def test_shards_that_lack_what_the_index_promises_are_refused(published, tmp_path):
    folder = copy_folder(published[1], tmp_path / "hf")
    index = {"weight_map": {"encoder.layernorm.bias": "model.safetensors", "more": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(V.UsageError, match="its shards lack more"):
        V.check_weights(folder)


def test_what_is_no_weights_at_all(tmp_path, published, monkeypatch):
    """Absent paths, empty folders, texts, other archives, pictures' encoders, a folder with --init_key."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    pointer(tmp_path / "pointer.pt")
    write_pt(tmp_path / "cut.pt", published[0])
    cut(tmp_path / "cut.pt")
    flat = {"patch_embed.proj.weight": torch.zeros(48, 3, 8, 8), "blocks.0.mlp.fc1.weight": torch.zeros(192, 48)}
    torch.save({"encoder": flat}, tmp_path / "picture.pt")
    swiglu = official(published[0])[0] | {"blocks.0.mlp.fc3.weight": torch.zeros(48, 96)}
    torch.save({"encoder": swiglu}, tmp_path / "swiglu.pt")
    cases = {
        "empty": "no config.json that can be read",
        "none.pt": "no such folder or file",
        "text.pt": "no .pt file",
        "list.pt": "cannot be read as weights",
        "other.pt": "no entry target_encoder; there are model",
        "pointer.pt": "git lfs pointer",
        "cut.pt": "no .pt file, cut",
        "picture.pt": "holds no video encoder",
        "swiglu.pt": "no place for blocks.0.mlp.fc3.weight",
    }
    for name, message in cases.items():
        with pytest.raises(V.UsageError) as caught:
            V.load_encoder(tmp_path / name, num_heads=4)
        assert message in str(caught.value) and "\n" not in str(caught.value), name
    with pytest.raises(V.UsageError, match="nothing to choose from"):
        V.load_encoder(published[1], "encoder")


def test_damaged_own_checkpoint_is_refused(tmp_path):
    """A flipped bit inside a tensor: the archive's checksums tell."""
    path = tmp_path / "ckpt.pt"
    torch.save(new_state(new_model(small_config())), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(V.UsageError, match="damaged"):
        V.read_weights(path)


def test_hub_ids_touch_the_network_and_nothing_else_does(tmp_path, published, monkeypatch):
    """An id is handed to huggingface_hub; a wrong one, or no network, is one line. What looks like a path never is."""
    hub, asked = pytest.importorskip("huggingface_hub"), []
    folders = {"facebook/vjepa2-tiny": str(published[1])}

    def download(name, allow_patterns):
        asked.append(name)
        if name not in folders:
            raise OSError(f"Repository Not Found for url {name}.\nPlease check the id")
        return folders[name]

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert V.load_encoder("facebook/vjepa2-tiny").cfg.enc_dim == 48
    with pytest.raises(V.UsageError) as caught:
        V.load_encoder("facebook/vjepa9")
    assert "Repository Not Found" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/none", "./none", "none", "a/b/c", "/none/a", "a/none.pt"):
        with pytest.raises(V.UsageError, match="no such folder or file"):
            V.load_encoder(path)
    assert asked == ["facebook/vjepa2-tiny", "facebook/vjepa9"]


@pytest.mark.parametrize("package, source", [("safetensors", "hf"), ("huggingface_hub", "facebook/vjepa2-tiny")])
def test_absent_packages_are_named(published, monkeypatch, package, source):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(V.UsageError, match=rf"needs the package {package} \(pip install {package}\)"):
        V.load_encoder(published[1] if source == "hf" else source)


# -- export


def exported(tmp_path, **changes):
    """A checkpoint with weights of its own everywhere, and its folder, exported by the command -> (model, folder)."""
    model = new_model(small_config(**{**FITS, "pos_embed": "rope", **changes}), seed=7)
    for parameter in (*model.target.parameters(), *model.predictor.parameters()):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.save(new_state(model), tmp_path / "ckpt.pt")
    flags = ["--ckpt", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out"), "--size", "32"]
    assert V.report_errors(export_hf.run, flags) in (None, V.EXIT_OK)
    return model.eval(), tmp_path / "out"


@torch.no_grad()
def test_exported_folder_opens_in_transformers_and_comes_back(tmp_path, capsys):
    """No key missing, unexpected or mismatched, equal outputs, and bit-equal weights when read again, the mask tokens
    of both families included. Seen red with the mask token written once."""
    model, folder = exported(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    theirs, info = transformers.VJEPA2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    clip = clip_of()
    found = theirs.eval()(pixel_values_videos=clip, skip_predictor=True).last_hidden_state
    assert (model.target(clip) - found).abs().max() < EQUAL
    tokens = theirs.predictor.embeddings.mask_tokens
    assert len(tokens) == 10 and all(token.norm() > 0 for token in tokens)
    back = loaded(folder)
    assert same(state_of(back.online), state_of(model.target))
    want = state_of(model.predictor)
    want["mask_tokens"][2] = want["mask_tokens"][0]
    assert same(state_of(back.predictor), want)
    assert "outcome head" in lines[1] and "mask token of SOON" in lines[1]
    assert "from the last tubelet" not in lines[1]


def test_published_weights_pass_through_a_run_unchanged(published, tmp_path):
    """Folder, run, checkpoint, folder: the same tensors to the bit, but for mask tokens that nobody trained."""
    model, folder = published
    torch.save(new_state(loaded(folder)), tmp_path / "ckpt.pt")
    V.export_hf(tmp_path / "ckpt.pt", tmp_path / "out")
    before, after = (safetensors_torch.load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    tokens = "predictor.embeddings.mask_tokens"
    assert torch.equal(after.pop(tokens), before.pop(tokens)[:1].expand(10, 1, 1, -1)) and same(before, after)


def test_what_the_format_cannot_say_is_refused(tmp_path, published, capsys):
    """sincos, pictures that are no squares, foreign files, folders that hold something, by the command."""
    for name, changes in (("sincos", dict(pos_embed="sincos")), ("wide", dict(image_size=(32, 48), pos_embed="rope"))):
        torch.save(new_state(new_model(small_config(**changes))), tmp_path / f"{name}.pt")
    write_pt(tmp_path / "official.pt", published[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    wide = str(tmp_path / "wide.pt")
    for ckpt, flags, message in (
        (str(tmp_path / "sincos.pt"), (), "the format has rope alone"),
        (wide, (), "takes all pictures for squares; name their side (--size)"),
        (wide, ("--size", "30"), "--size 30 is not divisible by patch = 8"),
        (wide, ("--size", "32", "--out", str(tmp_path / "full")), "is there already"),
        (wide, ("--key", "online", "--size", "32", "--out", str(tmp_path / "a")), ""),
        (str(tmp_path / "official.pt"), (), "no entry target"),
    ):
        code = V.report_errors(export_hf.run, ["--out", str(tmp_path / "new"), "--ckpt", ckpt, *flags])
        captured = capsys.readouterr()
        assert (code, message in captured.err) == ((V.EXIT_USAGE, True) if message else (V.EXIT_OK, True)), message
    assert "from the last tubelet" in captured.out or (tmp_path / "a/model.safetensors").is_file()
    assert (tmp_path / "full/mine.txt").read_text() == "mine" and not (tmp_path / "new").exists()


# -- config


def test_presets_have_the_published_sizes():
    """The parameters of the four encoders, in millions, counted without memory."""
    for name, millions in (("vitl", 303.9), ("vith", 631.6), ("vitg", 1012.2), ("vitg_384", 1012.2)):
        cfg = V.preset_config(f"vjepa2_{name}")
        V.validate_config(cfg)
        with torch.device("meta"):
            encoder = V.Encoder(cfg)
        assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6, 1) == millions


def test_defaults_of_the_predictor_follow_the_encoder():
    """0 is the encoder's count, so that weights and FLOP of runs made before stay as they are; others change both."""
    base, cfg = small_config(), small_config(pred_heads=4, pred_mlp_ratio=4.0)
    assert same(state_of(new_model(base).predictor), state_of(new_model(cfg).predictor))
    assert V.flops_per_clip(base) == V.flops_per_clip(cfg)
    wide = small_config(pred_mlp_ratio=8.0)
    assert V.flops_per_clip(wide)["predictor"] > V.flops_per_clip(base)["predictor"]
    assert V.flops_per_clip(wide)["online"] == V.flops_per_clip(base)["online"]


def test_checkpoints_from_before_these_fields_resume(tmp_path):
    """A config that lacks a MUST_MATCH field had its default."""
    state = new_state(new_model(small_config()))
    for name in ("pred_heads", "pred_mlp_ratio", "soon_start", "init_from"):
        del state["cfg"][name]
    V.check_same_run(state, small_config(), tmp_path)
    with pytest.raises(V.UsageError, match="soon_start = mask"):
        V.check_same_run(state, small_config(soon_start="mask"), tmp_path)


# -- runs


def test_a_run_starts_from_weights_and_its_resume_does_not(published, tmp_path, scene_folder, capsys):
    """The log tells both; the file may be gone by then, and rope stays. Seen red with pos_embed compared as given."""
    source = tmp_path / "hf"
    copy_folder(published[1], source)
    paths = dict(data_root=str(scene_folder), out_dir=str(tmp_path / "run"), init_from=str(source))
    still = dict(steps=1, lr=0.0, flow_lr=0.0, picture=False)
    cfg = small_config(**paths, **still, **FITS)
    assert V.train(replace(cfg)) == V.EXIT_OK
    first = capsys.readouterr().out
    assert "weights: encoder of" in first and "pos_embed: rope, as the weights need" in first
    model, saved = V.load_model(tmp_path / "run/checkpoints/ckpt_final.pt")
    assert (
        saved.pos_embed == "rope"
        and json.loads((tmp_path / "run/config.json").read_text())["config"]["pos_embed"] == "rope"
    )
    assert torch.equal(model.online.trunk.norm.weight, published[0].encoder.layernorm.weight)
    for path in source.iterdir():
        path.unlink()
    assert V.train(replace(cfg, steps=2)) == V.EXIT_OK
    second = capsys.readouterr().out
    assert "weights: encoder" not in second and f"init_from {source} does not count, the run goes on from" in second


@pytest.mark.slow
def test_ranks_start_from_the_same_weights(published, tmp_path, scene_folder):
    """Two ranks take in a folder, compare all weights as ever, and end with a checkpoint; the command exports it."""
    flags = dict(SMALL, **FITS, init_from=published[1], data_root=scene_folder, out_dir=tmp_path / "run", steps=2)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), "--no-picture"]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    run = dict(capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    done = subprocess.run([sys.executable, *command], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("weights: encoder of") == 1
    ckpt, out = tmp_path / "run/checkpoints/ckpt_final.pt", tmp_path / "out"
    tool = [str(ROOT / "tools/export_hf.py"), "--ckpt", str(ckpt), "--out", str(out), "--key", "online"]
    done = subprocess.run([sys.executable, *tool], **run)
    assert done.returncode == 0 and "no place there" in done.stdout, done.stderr
    assert same(state_of(V.load_encoder(out)), state_of(V.load_model(ckpt)[0].online))
