"""What bears a run's name in its folder and is of the wrong kind, and settings that name nothing."""

import pytest
from conftest import V, small_config
from training import cpu_process


@pytest.mark.parametrize("name", (".lease", "checkpoints/.written.json", "checkpoints"))
@pytest.mark.parametrize("kind", ("folder", "link to nothing", "file"))
def test_what_is_of_the_wrong_kind_is_moved_aside(tmp_path, name, kind):
    """It keeps its content, and the run can save. Seen red with `checkpoint could not be saved (Is a directory)`, the
    whole run lost, for a folder .written.json; with `cannot be written (Is a directory)` for a folder .lease."""
    out = tmp_path / "run"
    path = out / name
    path.parent.mkdir(parents=True)
    if kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine", encoding="utf-8")
    elif kind == "file":
        path.write_text("{}", encoding="utf-8")
    else:
        path.symlink_to(tmp_path / "nowhere" / "at_all")
    cfg = small_config(out_dir=str(out))
    with V.RunFolder(cfg, cpu_process()):
        assert V.save_checkpoint({"step": 3}, out, cfg, final=False).is_file()
    assert V.is_written(out / "checkpoints" / "ckpt_3.pt")
    if kind == "folder" and name != "checkpoints":
        assert (path.parent / "previous_1" / path.name / "mine").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ("resume", "out_dir"))
def test_settings_that_name_nothing(name, capsys, monkeypatch, tmp_path):
    """A script's unset variable: `--resume "$FILE"`. Seen red with a run that began anew over its checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(V, "train", lambda *args: 0)
    assert V.main(["--device", "cpu", f"--{name}", ""]) == 2
    assert f"{name} = '': must" in capsys.readouterr().err
