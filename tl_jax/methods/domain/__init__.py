"""Terms that move knowledge between domains, one file a family."""

from tl_jax.methods.domain.adversarial import adda, bsp, cdan, dann
from tl_jax.methods.domain.classifiers import afn, mcd, mcd_discrepancy, mcd_source, mdd
from tl_jax.methods.domain.consistency import balance, fixmatch, self_ensembling
from tl_jax.methods.domain.discrepancy import coral, jan, mmd
from tl_jax.methods.domain.generalise import coral_domains, fishr, groupdro, irm, mmd_domains, vrex
from tl_jax.methods.domain.outputs import bnm, entropy, infomax, mcc
from tl_jax.methods.domain.several import darn, m3sda, mdan
from tl_jax.methods.domain.source_free import shot
from tl_jax.methods.domain.test_time import adabn, eata, tent

TERMS = {
    term.__name__: term
    for term in (
        dann, cdan, adda, bsp, mmd, jan, coral, mcd, mcd_source, mcd_discrepancy, mdd, afn, mcc, bnm, entropy, infomax,
        fixmatch, self_ensembling, balance, m3sda, mdan, darn, irm, vrex, groupdro, coral_domains, mmd_domains, fishr,
        shot, adabn, tent, eata,
    )
}  # fmt: skip
