"""A client's name is anybody's text: whatever it holds, its files stay in its own folder, and a run takes it."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console
from tiny import records, tiny_config, write_records

from flex.graft.calibrate import Calibration
from flex.graft.choose import choose_grafts
from flex.graft.show import choice_table
from flex.runs.world import load_world
from flex.store.files import LONGEST_NAME, folder_name

SIMPLE = ("a", "closed_qa", "Ward 7", "site-3.b", "Zürich", "数学", "a..b", "x" * LONGEST_NAME)
ODD = (
    *("../../../../evil", "../server", "/etc", "N/A", "a\\b", "..", ".", ".hidden", "%2E", "~", "a~b", "a:b", "a\nb"),
    *("", "\0", "\ud800", "😀", "x" * 300, "x" * 301, "数" * 100, "/" * 200, "[/red]"),
)


@pytest.mark.parametrize("name", SIMPLE)
def test_a_simple_name_is_its_own_folder(name):
    assert folder_name(name) == name


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_gives_one_plain_folder(tmp_path, name):
    folder = folder_name(name)
    assert folder == folder_name(name)
    assert not folder.startswith(".")
    assert not set(folder) & set("/\\:\n\0")
    assert len(folder.encode()) <= LONGEST_NAME
    (tmp_path / folder).mkdir()
    assert os.listdir(tmp_path) == [folder]


def test_different_names_give_different_folders():
    names = {*SIMPLE, *ODD}
    # What the scheme itself writes is a name like any other, and gets another folder.
    names |= {folder_name(name) for name in names}
    assert len({folder_name(name) for name in names}) == len(names)


def test_the_files_of_every_client_stay_in_the_job_and_are_found_again(tmp_path):
    names = ["../../../../evil", "../server", "N/A", "[/red]", "x" * 300, "plain"]
    config = tiny_config(tmp_path, data={"test": ""})
    write_records(Path(config.data.train), [{**r, "client": name} for name in names for r in records("a", 6)])
    world = load_world(config, 0)
    job = tmp_path / "deep" / "enough" / "for" / "the" / "way" / "out"
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    for site in world.sites(config, "flex", 0, job).values():
        site.train(1, site.model.shared_arrays())
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert {p.parent.parent for p in written} == {job / "clients"}
    assert {p.parent.name for p in written} == {folder_name(name) for name in names}
    again = world.sites(config, "flex", 0, job)
    assert all(again[name].store.load(1).parameters for name in names)


def test_a_name_is_no_markup_of_the_terminal(tmp_path):
    config = tiny_config(tmp_path)
    world = load_world(config, 0)
    calibration = Calibration(world.base, world.encoder, world.clients[0].train, 4)
    choices = choose_grafts(calibration, config.graft, "s")
    printed = io.StringIO()
    Console(width=120, file=printed).print(choice_table("[/red]", 1, choices))
    assert "client [/red]" in printed.getvalue()
