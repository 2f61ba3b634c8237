import pytest

from camelid.data.readers.wikitext import clean


@pytest.mark.parametrize(
    ("tokenized", "text"),
    [
        ("0 @-@ 7 , 1 @,@ 000 , 2 @.@ 5", "0-7, 1,000, 2.5"),
        ("E @-@ A @-@ E @-@ A", "E-A-E-A"),
        ("men 's , did n't , I 'll , he 'd not 'stay", "men's, didn't, I'll, he'd not 'stay"),
        ('" One , " he said . " Two ! "', '"One," he said. "Two!"'),
        ("' word ' , players ' union", "'word', players' union"),
        ("( 24 in ) , [ 1 ]", "(24 in), [1]"),
        ("$ 5 , £ 5 , 50 % , 45 ° F , 45 ° north", "$5, £5, 50%, 45 °F, 45° north"),
        ("5 – 6 , 12 : 30 , km / h , a – b", "5–6, 12:30, km/h, a – b"),
        (" Why ? Because ; so : yes ! ", "Why? Because; so: yes!"),
        ("U.S. Route 2 is .5 long", "U.S. Route 2 is .5 long"),
        (" = One = ", "= One ="),
        (" = = Two = = ", "== Two =="),
        (" = = = Three 's = = = ", "=== Three's ==="),
        ("a = b = = c", "a = b == c"),
        (" \n a , <unk> . \n \n b \n", "a, <unk>.\n\nb"),
    ],
)
def test_tokenization_is_taken_back(tokenized: str, text: str):
    assert clean(tokenized) == text
