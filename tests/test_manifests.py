"""Tables as other programs write them: their separators, their names of columns, their ids."""

import json
from pathlib import Path

import pytest
from conftest import tone, write_audio

from tiny_audio.training.manifests import DataError, read_source


def rows_of(path: Path, **source) -> list[tuple[str, str, bool]]:
    """Id, text and whether the audio is there, of a manifest's rows."""
    read = read_source({"path": str(path), **source})
    return [(e.id, e.text, Path(e.audio).is_file() and e.duration > 0) for e in read]


def test_a_table_of_common_voice(tmp_path, capsys):
    """Tabs, its own names, quotes that mean nothing, clips in a folder of their own."""
    (tmp_path / "clips").mkdir()
    for i in range(2):
        write_audio(tmp_path / "clips" / f"common_voice_{i}.mp3", tone(1.0), 16_000, "libmp3lame")
    table = tmp_path / "train.tsv"
    table.write_text(
        "client_id\tpath\tsentence_id\tsentence\tup_votes\n"
        'a1\tcommon_voice_0.mp3\t007\t"Well, he said.\t2\n'
        "a2\tcommon_voice_1.mp3\t008\tNone\t2\n"
    )
    assert rows_of(table) == [("train-0", '"Well, he said.', True), ("train-1", "None", True)]
    said = capsys.readouterr().out
    assert (
        "audio is read from column 'path'" in said and "text is read from column 'sentence'" in said
    )


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("names", [("file", "transcription"), ("path", "transcript")])
def test_tables_as_programs_write_them(tmp_path, separator, names):
    write_audio(tmp_path / "a.wav", tone(1.0), 16_000, "pcm_s16le")
    table = tmp_path / "m.csv"
    table.write_text(separator.join(("id", *names)) + "\n" + separator.join(("007", "a.wav", "hi")))
    assert rows_of(table) == [("007", "hi", True)]


def test_columns_that_nobody_can_guess_are_named(tmp_path):
    table = tmp_path / "m.csv"
    table.write_text("sound,words\na.wav,hello\n")
    with pytest.raises(DataError, match=r"no column 'audio'; has .*'sound'.*audio_column="):
        rows_of(table)
    with pytest.raises(DataError, match=r"text_column="):
        rows_of(table, audio_column="sound")


def test_a_file_that_is_no_manifest_says_what_is_read(tmp_path):
    (tmp_path / "list.txt").write_text("a.wav hello")
    with pytest.raises(DataError, match=r"list\.txt: unknown file type; known types: \.jsonl"):
        rows_of(tmp_path / "list.txt")


def test_ids_stay_as_they_are_written(tmp_path):
    """What looks like a date is none, and what is separated by other marks is one line."""
    write_audio(tmp_path / "a.wav", tone(1.0), 16_000, "pcm_s16le")
    ids = ["2024-01-02 03:04:05", "2024-01-02T03:04:05Z", "007", "1e5", "a\u2028b"]
    rows = [{"id": id, "audio": "a.wav", "text": "hi"} for id in ids]
    path = tmp_path / "m.jsonl"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"{lines}\n\n", encoding="utf-8")
    assert [row[0] for row in rows_of(path)] == ids
    path.write_text(lines, encoding="utf-8-sig")
    assert [row[0] for row in rows_of(path)] == ids
