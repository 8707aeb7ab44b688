"""List the model types that were checked through transformers; docs/models.md describes what was checked.

Each list is a text of names. The native families are in :mod:`retemper.engine.model.family_table`. A type in no list
may work: the check at the start of each run decides.
"""

PACKED = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2_moe cohere_compass_text ctrl cwm dbrx
    deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma3n_text
    gemma4_text gemma4_unified_text glm glm4_moe_lite gpt2 gpt_bigcode gpt_oss granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe
    kolibri1 laguna longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral
    modernbert-decoder nanochat nemotron olmo olmoe opt persimmon phi phimoe solar_open stablelm vaultgemma
    youtu
"""
"""Types whose documents are computed all at once."""
ONE_AT_A_TIME = """
    bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2
    minimax nemotron_h olmo_hybrid openai-gpt qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm
    zaya
"""
"""Types whose blocks compute one document after the other, because not only attention mixes tokens."""
OWN_ATTENTION = """
    axk2 bloom codegen deepseek_v32 doge falcon glm_moe_dsa gpt_neo gpt_neox_japanese gptj hrm_text hy_v4
    inkling_text llama4_text mpt xglm
"""
"""The same, with the attention of transformers."""
REFUSED = """
    deepseek_v4 dots3_note_text inkling2_text zamba zamba2
"""
"""Types that cannot be trained."""
