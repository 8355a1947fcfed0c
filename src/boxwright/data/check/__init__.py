"""The dataset doctor, `boxwright data check`: a dataset on disk → everything in it that training would refuse, leave
out or mend, and what looks wrong though nothing forbids it. It only reads.
"""

from boxwright.data.check.doctor import Checked, Rules, check_dataset

__all__ = ["Checked", "Rules", "check_dataset"]
