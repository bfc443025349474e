"""queryfoil foils score-based query attacks: it protects a classifier's scores and measures the protection."""

from queryfoil import data as data
from queryfoil import metrics as metrics
from queryfoil import models as models
from queryfoil.api import attack as attack
from queryfoil.attacks import ATTACKS as ATTACKS
from queryfoil.data import DATASETS as DATASETS
from queryfoil.defenses import DEFENSES as DEFENSES
from queryfoil.defenses.aaa import AAA as AAA
from queryfoil.defenses.calibration import Fit as Fit
from queryfoil.defenses.noise import InputNoise as InputNoise
from queryfoil.defenses.terrace_fit import TerraceFit as TerraceFit
from queryfoil.defenses.terraces import Terraces as Terraces
from queryfoil.flags.check import check as check
from queryfoil.flags.flag import Flag as Flag
from queryfoil.models import MODELS as MODELS
from queryfoil.protect import disguise as disguise
from queryfoil.protect import fit as fit
from queryfoil.protect import load_fit as load_fit
from queryfoil.protect import protect as protect
from queryfoil.run import Result as Result

__version__ = "0.1.0"
