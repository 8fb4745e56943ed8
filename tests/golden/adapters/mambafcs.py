"""Mamba-FCS: `case_jsf` the spectral fusion, `case_pyramid` the pyramid fusion, `case_net` the network, losses else."""

from functools import partial
from typing import Any

from medmamba.layers.change_pair import CHANGE, split_scores
from medmamba.nets import own_name
from medmamba.nets.mambafcs import MambaFCS, MambaFCSConfig, PyramidFusion, SpectralFusion
from pipelines.learning.change_losses import MAMBAFCS, Triple, published_sek_loss, semantic_change_terms, weighted
from tests.golden.adapters.changemamba import NAMES, of_pair, settings
from tests.golden.case import Built, Tensors, Tolerance, from_module

MEASURED = Tolerance(output=2.1e-5)  # 10 x the error the SPEC measured


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    if "num_classes" in hparams:
        return Built(forward=partial(losses, hparams))
    used = {name: value for name, value in params.items() if own_name(MambaFCS, name) is not None}
    if "dims" in hparams:
        own = settings(hparams, inputs)
        del own["width"]
        config = MambaFCSConfig(out_channels=CHANGE + 2 * hparams["output_clf"], **own)
        return of_pair(
            MambaFCS(config), used, lambda scores: dict(zip(NAMES, split_scores(scores), strict=True)), MEASURED
        )
    if "out_channels" in hparams:
        return from_module(PyramidFusion(hparams["in_channels"], hparams["out_channels"]), used)
    return from_module(SpectralFusion(hparams["in_channels"]), used)


def losses(hparams: dict[str, Any], inputs: Tensors) -> Tensors:
    """Every term; the object's first call of SeK enters the total, later calls have another eps."""
    scores = Triple(inputs["pred_cd"], inputs["pred_t1"], inputs["pred_t2"])
    labels = Triple(inputs["label_cd"], inputs["label_t1"], inputs["label_t2"])
    settings = {"unchanged": hparams["non_change_class"], "beta": hparams["beta"], "gamma": hparams["gamma"]}
    first = partial(published_sek_loss, **settings, eps=hparams["eps"])
    terms = semantic_change_terms(scores, labels, sek=first)
    later = published_sek_loss(scores, labels, **settings, eps=1e-6)
    return {**terms, "sek_first": terms["sek"], "sek_later": later, "total": weighted(terms, MAMBAFCS)}
