"""Terms that move knowledge between domains, one file a family."""

from tl_jax.methods.domain.adversarial import bsp, cdan, dann
from tl_jax.methods.domain.classifiers import afn, mcd, mdd
from tl_jax.methods.domain.consistency import balance, fixmatch, self_ensembling
from tl_jax.methods.domain.discrepancy import coral, jan, mmd
from tl_jax.methods.domain.generalise import coral_domains, fishr, groupdro, irm, mmd_domains, vrex
from tl_jax.methods.domain.outputs import bnm, entropy, infomax, mcc
from tl_jax.methods.domain.several import darn, m3sda, mdan

TERMS = {
    term.__name__: term
    for term in (
        dann, cdan, bsp, mmd, jan, coral, mcd, mdd, afn, mcc, bnm, entropy, infomax, fixmatch, self_ensembling, balance,
        m3sda, mdan, darn, irm, vrex, groupdro, coral_domains, mmd_domains, fishr,
    )
}  # fmt: skip
