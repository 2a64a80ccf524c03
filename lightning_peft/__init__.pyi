from lightning_peft import export as export
from lightning_peft import functional as functional
from lightning_peft import registry as registry
from lightning_peft import testing as testing
from lightning_peft.attach.hub import apply_terms as apply_terms
from lightning_peft.compose.lanes import Lane as Lane
from lightning_peft.compose.lanes import Resource as Resource
from lightning_peft.compose.loss import Loss as Loss
from lightning_peft.compose.loss import Step as Step
from lightning_peft.compose.plan import plan as plan
from lightning_peft.compose.run import Run as Run
from lightning_peft.compose.schedule import Schedule as Schedule
from lightning_peft.export.bake import bake as bake
from lightning_peft.export.bake import bake_checkpoint as bake_checkpoint
from lightning_peft.export.bake import load_from_checkpoint as load_from_checkpoint
from lightning_peft.method import Method as Method
from lightning_peft.weights.maps import WeightMap as WeightMap
from lightning_peft_plugins.regularizers.pskd import PSKD as PSKD
from lightning_peft_plugins.regularizers.weight_compander import WeightCompander as WeightCompander
from lightning_peft_plugins.sparsity.nm_sparsity import NMSparsity as NMSparsity

__version__: str
