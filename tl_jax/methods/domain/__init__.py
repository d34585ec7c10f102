"""Terms that move knowledge between domains, one file a family."""

from tl_jax.methods.domain.adversarial import bsp, cdan, dann
from tl_jax.methods.domain.classifiers import afn, mcd, mdd
from tl_jax.methods.domain.consistency import balance, fixmatch, self_ensembling
from tl_jax.methods.domain.discrepancy import coral, jan, mmd
from tl_jax.methods.domain.outputs import bnm, entropy, infomax, mcc

TERMS = {
    term.__name__: term
    for term in (
        dann, cdan, bsp, mmd, jan, coral, mcd, mdd, afn, mcc, bnm, entropy, infomax, fixmatch, self_ensembling, balance,
    )
}  # fmt: skip
