"""The entries, by theme; importing this package registers all of them in `ZOO`."""

from tests.zoo.entry import ZOO as ZOO
from tests.zoo.models import adversarial as adversarial
from tests.zoo.models import basics as basics
from tests.zoo.models import branches as branches
from tests.zoo.models import huggingface as huggingface
from tests.zoo.models import normalization as normalization
from tests.zoo.models import sequence as sequence
from tests.zoo.models import training as training
from tests.zoo.models import vision as vision
from tests.zoo.models import weights as weights
