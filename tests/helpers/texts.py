"""Texts in many scripts and with special characters, for tests that compare tokenizers."""

from scripts.tok_eval import TEXTS

MULTILINGUAL = [
    *TEXTS.values(),
    # Arabic, Hindi, Thai, Russian, Chinese, German, Vietnamese
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645\u060c \u0643\u062a\u0627\u0628\u064c"
    " \u0661\u0662\u0663",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430 1 234,56 \u20bd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u7b2c\uff11\uff12\u7ae0\u3000\U00020bb7",
    "Gr\u00fc\u00dfe aus K\u00f6ln; stra\u00dfe STRASSE \u1e9e \ufb03 \u0130\u0131",
    "Vi\u1ec7t Nam, Vie\u0323\u0302t Nam",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7\U0001f1e9 \U0001f44d\U0001f3fd",
    "I've, WE'LL, he'D, it\u2019s, '\u017fa, 'Sx, ''re,'t",  # U+017F matches "s" case-insensitively
    "1 12 123 1234567 3.14e-10 0x1F \u00bd \u2167 \u0663\u0664",
    "for (int i=0; i<n; ++i) {\n\tsum += a[i]; // x\r\n}\r\n\r\n    return 0;",
    "  a   b\t\tc \n \n\n  d\r\r\n \u00a0\u2003\u3000\u2028\u0085 e   ",
    " " * 100 + "x" + "\n" * 50 + "\t" * 7,
    "\x00\x01\x1f\x7f\ufeff\uffff\ufffd",
    "a" * 1000,
    "-----====!!!!????....",
    "",
]
SPECIAL_LOOKING = ["<|bos|>", "x<|user_end|>y <|assistant_end|>\n", "<|bos|", "<<|bos|>>", "<|unknown|>"]
