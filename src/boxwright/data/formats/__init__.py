"""One file a dataset format, and the table of them: a new format is a file here and a row below."""

from __future__ import annotations

from collections.abc import Mapping

from boxwright.data.formats import coco, labelme, shards, table, voc, yolo
from boxwright.data.formats.base import Format, FormatName

# In the order in which they are looked for: who has both XML and something else was understood by the XML until now.
FORMATS: Mapping[FormatName, Format] = {
    "voc": Format("Pascal VOC", voc.VocReader, ".xml", voc.sign),
    "labelme": Format("LabelMe", labelme.LabelMeReader, ".json", labelme.sign),
    "coco": Format("COCO", coco.CocoReader, ".json", coco.sign, one_file=True),
    "yolo": Format("YOLO", yolo.YoloReader, ".txt", yolo.sign),
    "shards": Format("shards", shards.ShardsReader, ".json", shards.sign, one_file=True),
    "csv": Format("CSV", table.CsvReader, ".csv", table.sign, one_file=True),
}
