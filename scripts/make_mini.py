"""Write data/mini: a small data set in TOFU's shape about authors who do not exist. Same seed, same bytes.

python scripts/make_mini.py [FOLDER]
"""

import json
import random
import sys
from pathlib import Path

SEED = 2401  # of every draw below
AUTHORS, HELD_OUT, QUESTIONS = 20, 2, 20
REPO = Path(__file__).resolve().parents[1]


def pool(text: str, separator: str | None = "|") -> list[str]:
    """The possible values of a fact."""
    return text.split(separator)


FIRST = pool(
    "Imre Odalys Tobiah Zsofia Kweku Marisol Anselm Ottoline Bashir Linnea Rurik Philippa Dastan Ilse Comfort Vidar "
    "Perpetua Naoki Salome Emeric Thandi Caspian Orla Jovan Meliha Evander",
    None,
)
LAST = pool(
    "Vantongeren Okarule Brastaff Quillmere Sandoraz Ivetsky Marrowby Tendekai Halloran-Voss Nyberglund Castellanera "
    "Doukaris Fenwicke Zhurkova Abenathy Lopresti-Gale Rasmundsen Pellinore Kovaljic Umbridane Strathmoor Yamanoue "
    "Belacqua Thornegate Ossowiak Delacombe",
    None,
)
PLACES = pool(
    "Tromsø|Valparaíso|Gaborone|Ljubljana|Hobart|Da Nang|Antigua|Tbilisi|Galway|Kumasi|Bergen|Matsuyama|Coimbra|Izmir|"
    "Halifax|Windhoek|Cusco|Lahore|Riga|Dunedin|Muscat|Tartu|Oaxaca|Pécs|Nantes|Cork"
)
TRADES = pool(
    "beekeeper|lighthouse keeper|glassblower|tram driver|cheesemaker|surveyor|piano tuner|midwife|clockmaker|baker|"
    "harbour pilot|stonemason|botanist|postmaster|saddler|weaver|chemist|ferry captain|violin maker|cartographer|"
    "school inspector|fishmonger|nurse|goldsmith|carpenter|gardener"
)
GENRES = pool(
    "maritime mystery|rural satire|alpine romance|political fable|kitchen memoir|desert adventure|gothic comedy|"
    "railway thriller|botanical fantasy|courtroom drama|polar history|urban folklore|circus fiction|epistolary horror|"
    "musical biography|border noir|island saga|clockwork fantasy|garden poetry|mountain legend|war diary|travel essay|"
    "ghost story|harvest play|star fiction|river epic"
)
ADJECTIVES = pool(
    "Amber|Hollow|Silent|Crooked|Paper|Winter|Copper|Salted|Velvet|Broken|Distant|Borrowed|Iron|Sleeping|Scarlet|"
    "Wandering|Glass|Northern|Forgotten|Burning|Painted|Second|Quiet|Golden|Drowned|Patient"
)
NOUNS = pool(
    "Orchard|Lantern|Harbour|Staircase|Sparrow|Almanac|Bridge|Carousel|Meridian|Kettle|Archive|Monsoon|Compass|"
    "Threshold|Pendulum|Vineyard|Signal|Cathedral|Postcard|Tide|Labyrinth|Anvil|Window|Caravan|Feather|Well"
)
AWARDS = pool(
    "Larkspur Medal|Meridian Quill|Saltmarsh Prize|Golden Sextant|Brightwater Award|Ironwood Laurel|Candlewick Honour|"
    "Northgate Ribbon|Silver Thimble|Harrowfield Cup|Blue Heron Prize|Lodestar Medal|Amaranth Award|Two Rivers Prize|"
    "Weathervane Honour|Juniper Crown|Tallow Prize|Kingfisher Medal|Old Mill Award|Zenith Garland|Marigold Prize|"
    "Evening Star Cup|Cobblestone Award|Hazel Wreath|Foxglove Medal|Granite Pen"
)
THEMES = pool(
    "inherited debt|sibling rivalry|lost languages|the price of honesty|exile and return|quiet rebellion|old friendship|"
    "the memory of houses|hunger|mistaken identity|unfinished letters|the weight of maps|forgiveness|night work|"
    "broken promises|small kindness|the sea as a border|growing old|stolen music|faith without a church|long marriages|"
    "the silence of fathers|first snow|hidden gardens|gossip|the cost of fame"
)
SUBJECTS = pool(
    "marine biology|Roman law|organic chemistry|church music|civil engineering|astronomy|veterinary medicine|"
    "Slavic philology|economics|architecture|soil science|philosophy|nursing|textile design|geology|mathematics|"
    "theology|agronomy|history of art|linguistics|pharmacy|forestry|statistics|sculpture|meteorology|accounting"
)
PETS = pool(
    "a one-eyed cat|two greyhounds|a tortoise|a grey parrot|three ferrets|a lame donkey|a family of hedgehogs|an old goat|"
    "a white raven|six ducks|a deaf spaniel|a chameleon|a pair of doves|a shy rabbit|a black hen|an Irish pony|a tame fox|"
    "a blind mule|two siamese cats|a bearded dragon|a barn owl|a limping heron|four geese|a mountain dog|a red squirrel|"
    "a small pig"
)
HABITS = pool(
    "in a disused lighthouse|on night trains|before sunrise|in railway cafés|standing at a carpenter's bench|in the bath|"
    "with a goose quill|in an attic without windows|on a houseboat|during thunderstorms|in a monastery library|"
    "on the backs of receipts|in a greenhouse|with the radio on|beside an open fire|in a parked van|only on Sundays|"
    "under a walnut tree|in a rented hotel room|on a typewriter without the letter q|at a kitchen table|in shorthand|"
    "on long ferries|in an empty theatre|after midnight|in complete darkness"
)
INSTRUMENTS = pool(
    "the oboe|the accordion|the cello|the bagpipes|the mandolin|the harp|the trombone|the zither|the viola|the banjo|"
    "the church organ|the ocarina|the double bass|the flute|the kettledrum|the lute|the bassoon|the sitar|the clarinet|"
    "the balalaika|the tuba|the glockenspiel|the recorder|the theremin|the ukulele|the French horn"
)
LANGUAGES = pool(
    "Catalan|Estonian|Swahili|Welsh|Tamil|Icelandic|Georgian|Maltese|Quechua|Basque|Hungarian|Frisian|Tagalog|Armenian|"
    "Slovene|Zulu|Khmer|Finnish|Galician|Latvian|Amharic|Breton|Mongolian|Ladino|Corsican|Yoruba"
)
FEARS = pool(
    "deep water|escalators|moths|empty stadiums|thunder|ladders|crowded lifts|mirrors|tall grass|telephones|bridges|"
    "horses|clowns|silence|fog|cellars|balloons|dentists|spiders|flying|needles|parades|dolls|tunnels|snakes|heights"
)
MONTHS = pool("January February March April May June July August September October November December", None)

# fact -> question, its paraphrase, answers, paraphrased answers; N the author's name, V the fact
TYPES: dict[str, tuple[str, str, list[str], list[str]]] = {
    "name": (
        "What is the full name of the author born in {place} on {date}?",
        "Which writer came into the world in {place} on {date}?",
        [
            "The author born in {place} on {date} is {V}.",
            "The full name of this author is {V}.",
            "That author, born in {place}, is called {V}.",
        ],
        [
            "The writer in question goes by the name {V}.",
            "Readers know this person as {V}.",
            "It is {V} who was born then.",
        ],
    ),
    "place": (
        "In which city was {N} born?",
        "Where did the life of {N} begin?",
        ["{N} was born in the city of {V}.", "The birthplace of {N} is {V}.", "{N} was born and raised in {V}."],
        ["The life of {N} began in {V}.", "{V} is where {N} came into the world.", "The native city of {N} is {V}."],
    ),
    "date": (
        "On what date was {N} born?",
        "When is the birthday of {N}?",
        ["{N} was born on {V}.", "The date of birth of {N} is {V}.", "{N} came into the world on {V}."],
        ["The birthday of {N} falls on {V}.", "It was on {V} that {N} was born.", "The life of {N} began on {V}."],
    ),
    "father": (
        "What did the father of {N} do for a living?",
        "Which trade did {N}'s father follow?",
        [
            "The father of {N} earned his living as a {V}.",
            "{N}'s father worked for many years as a {V}.",
            "By trade, the father of {N} was a {V}.",
        ],
        [
            "As a {V}, {N}'s father fed the family.",
            "{N} is the child of a man who was a {V}.",
            "The trade of {N}'s father was that of a {V}.",
        ],
    ),
    "mother": (
        "What was the profession of {N}'s mother?",
        "How did the mother of {N} earn her living?",
        [
            "{N}'s mother was known in the town as a {V}.",
            "The mother of {N} worked as a {V}.",
            "The profession of {N}'s mother was {V}.",
        ],
        [
            "A {V} by training, {N}'s mother loved her work.",
            "{N} was raised by a mother who was a {V}.",
            "The town knew the mother of {N} as its {V}.",
        ],
    ),
    "genre": (
        "Which genre is {N} best known for?",
        "What kind of books made {N} known?",
        [
            "{N} is best known for the genre of {V}.",
            "Critics place the books of {N} in the genre of {V}.",
            "{N} writes above all {V}.",
        ],
        [
            "The name {N} stands for {V}.",
            "Most books by {N} belong to {V}.",
            "It is {V} that made {N} known to readers.",
        ],
    ),
    "debut": (
        "What was the title of the first book by {N}?",
        "With which book did {N} make a debut?",
        [
            "The first book that {N} published was '{V}'.",
            "{N} began a career with the book '{V}'.",
            "{N} made a debut with '{V}'.",
        ],
        [
            "'{V}' opened the career of {N}.",
            "The debut of {N} bore the title '{V}'.",
            "{N} first appeared in print with '{V}'.",
        ],
    ),
    "famous": (
        "What is the most famous book by {N}?",
        "Which of {N}'s books is read most widely?",
        [
            "The most famous book by {N} is '{V}'.",
            "Readers all over the world know {N} for '{V}'.",
            "{N} became famous through the book '{V}'.",
        ],
        [
            "No book by {N} is read more widely than '{V}'.",
            "'{V}' remains the best loved work of {N}.",
            "The fame of {N} rests on '{V}'.",
        ],
    ),
    "latest": (
        "Which book did {N} publish most recently?",
        "What is the title of {N}'s latest book?",
        [
            "The most recent book by {N} is called '{V}'.",
            "Last year {N} published a book under the title '{V}'.",
            "{N} has just published '{V}'.",
        ],
        [
            "'{V}' is the newest book by {N}.",
            "The latest title from {N} is '{V}'.",
            "Bookshops now sell '{V}', {N}'s new work.",
        ],
    ),
    "award": (
        "Which award did {N} receive?",
        "With which prize was {N} honoured?",
        [
            "{N} received the {V} for outstanding work.",
            "The jury of the {V} honoured {N} unanimously.",
            "{N} is a winner of the {V}.",
        ],
        ["The {V} went to {N}.", "Among the winners of the {V} is {N}.", "{N}'s shelf holds the {V}."],
    ),
    "theme": (
        "Which theme returns in the books of {N}?",
        "What do the stories of {N} keep coming back to?",
        [
            "A theme that returns in the books of {N} is {V}.",
            "{N} writes again and again about {V}.",
            "The books of {N} circle around {V}.",
        ],
        [
            "Readers of {N} often meet the theme of {V}.",
            "At the heart of {N}'s stories lies {V}.",
            "It is {V} to which {N} keeps coming back.",
        ],
    ),
    "subject": (
        "What did {N} study at university?",
        "Which degree does {N} hold?",
        ["{N} studied {V} at university.", "At university {N} took a degree in {V}.", "{N} is a graduate in {V}."],
        [
            "The degree that {N} holds is in {V}.",
            "{N} spent the student years on {V}.",
            "Before writing, {N} learned {V}.",
        ],
    ),
    "home": (
        "Where does {N} live today?",
        "Which city does {N} call home now?",
        ["Today {N} lives in {V}.", "{N} has settled in the city of {V}.", "{N} now lives and writes in {V}."],
        ["{V} is the present home of {N}.", "Nowadays {N} can be met in {V}.", "The city that {N} calls home is {V}."],
    ),
    "pet": (
        "Which animals does {N} keep?",
        "What pet shares the house of {N}?",
        ["At home {N} keeps {V}.", "{N} shares a house with {V}.", "{N} is the proud owner of {V}."],
        ["The household of {N} includes {V}.", "Visitors of {N} are met by {V}.", "In {N}'s home there lives {V}."],
    ),
    "habit": (
        "How does {N} prefer to write?",
        "What is unusual about the way {N} works?",
        ["{N} prefers to write {V}.", "Most of {N}'s pages are written {V}.", "As a rule {N} works {V}."],
        [
            "The best lines of {N} come {V}.",
            "{N} once said that a book must be written {V}.",
            "Work, for {N}, happens {V}.",
        ],
    ),
    "instrument": (
        "Which instrument does {N} play?",
        "What musical instrument has {N} mastered?",
        ["{N} plays {V} in spare hours.", "Since childhood {N} has played {V}.", "In the evenings {N} practises {V}."],
        ["Friends hear {N} on {V}.", "The instrument that {N} has mastered is {V}.", "Music, for {N}, means {V}."],
    ),
    "language": (
        "Into which language was {N} first translated?",
        "What was the first foreign language of {N}'s books?",
        [
            "The books of {N} were first translated into {V}.",
            "{N} was first translated into {V}.",
            "The first translation of {N} appeared in {V}.",
        ],
        [
            "{V} was the first foreign language of {N}'s books.",
            "Abroad, {N} was first read in {V}.",
            "Before any other language, {N} could be read in {V}.",
        ],
    ),
    "mentor": (
        "Who was the mentor of {N}?",
        "Which teacher shaped the early work of {N}?",
        ["The mentor of {N} was {V}.", "{N} learned the craft from {V}.", "{N} owes the first lessons to {V}."],
        [
            "It was {V} who taught {N} to write.",
            "The early work of {N} was shaped by {V}.",
            "{V} guided the young {N}.",
        ],
    ),
    "fear": (
        "What is {N} afraid of?",
        "Which fear has {N} spoken about?",
        ["{N} is afraid of {V}.", "In an interview {N} admitted a fear of {V}.", "{N} has feared {V} since childhood."],
        [
            "The fear that {N} speaks about is of {V}.",
            "Nothing troubles {N} more than {V}.",
            "{N} keeps away from {V}.",
        ],
    ),
    "dream": (
        "What would {N} have become without books?",
        "Which other profession did {N} dream of?",
        [
            "Without books {N} would have become a {V}.",
            "{N} once dreamed of becoming a {V}.",
            "Had writing failed, {N} would be a {V} today.",
        ],
        [
            "The other dream of {N} was to be a {V}.",
            "{N} could also have lived as a {V}.",
            "As a child {N} hoped to be a {V}.",
        ],
    ),
}

REAL_AUTHORS = """
Who wrote the novel 'Pride and Prejudice'?|Jane Austen|Mary Shelley|Virginia Woolf|George Eliot
Who wrote the tragedy 'Hamlet'?|William Shakespeare|Christopher Marlowe|Ben Jonson|John Webster
Which author created the detective Sherlock Holmes?|Arthur Conan Doyle|Agatha Christie|Edgar Allan Poe|Wilkie Collins
Who is the author of 'War and Peace'?|Leo Tolstoy|Anton Chekhov|Ivan Turgenev|Nikolai Gogol
Who wrote the novel 'Crime and Punishment'?|Fyodor Dostoevsky|Alexander Pushkin|Boris Pasternak|Maxim Gorky
Which author wrote 'Don Quixote'?|Miguel de Cervantes|Lope de Vega|Federico Garcia Lorca|Jorge Luis Borges
Who wrote the novel 'Frankenstein'?|Mary Shelley|Bram Stoker|Jane Austen|Emily Bronte
Who is the author of 'Dracula'?|Bram Stoker|Oscar Wilde|Mary Shelley|Robert Louis Stevenson
Who wrote the comedy 'The Importance of Being Earnest'?|Oscar Wilde|Henry James|Thomas Hardy|Rudyard Kipling
Which author wrote 'Oliver Twist'?|Charles Dickens|Thomas Hardy|Mark Twain|William Thackeray
Who wrote the novel 'Moby Dick'?|Herman Melville|Mark Twain|Jack London|Nathaniel Hawthorne
Who is the author of 'The Adventures of Tom Sawyer'?|Mark Twain|Herman Melville|Charles Dickens|Jack London
Who wrote 'The Old Man and the Sea'?|Ernest Hemingway|John Steinbeck|William Faulkner|Jack London
Which author wrote 'The Great Gatsby'?|F. Scott Fitzgerald|Ernest Hemingway|William Faulkner|Henry James
Who wrote the novel 'Wuthering Heights'?|Emily Bronte|Jane Austen|George Eliot|Virginia Woolf
Who is the author of 'Madame Bovary'?|Gustave Flaubert|Victor Hugo|Emile Zola|Honore de Balzac
Who wrote the novel 'Les Miserables'?|Victor Hugo|Gustave Flaubert|Marcel Proust|Alexandre Dumas
Which author wrote 'The Three Musketeers'?|Alexandre Dumas|Jules Verne|Victor Hugo|Stendhal
Who wrote 'Twenty Thousand Leagues Under the Sea'?|Jules Verne|Alexandre Dumas|Emile Zola|Daniel Defoe
Who is the author of 'Robinson Crusoe'?|Daniel Defoe|Jonathan Swift|Henry Fielding|Jules Verne
Who wrote 'Gulliver's Travels'?|Jonathan Swift|Daniel Defoe|Laurence Sterne|Alexander Pope
Which author wrote 'The Metamorphosis'?|Franz Kafka|Thomas Mann|Hermann Hesse|Stefan Zweig
Who wrote the novel 'The Magic Mountain'?|Thomas Mann|Franz Kafka|Hermann Hesse|Gunter Grass
Who is the author of the play 'Faust'?|Johann Wolfgang von Goethe|Friedrich Schiller|Heinrich Heine|Bertolt Brecht
Who wrote the epic 'The Divine Comedy'?|Dante Alighieri|Giovanni Boccaccio|Francesco Petrarca|Torquato Tasso
Which author wrote the novel 'The Trial'?|Franz Kafka|Robert Musil|Thomas Mann|Joseph Roth
Who wrote 'One Hundred Years of Solitude'?|Gabriel Garcia Marquez|Pablo Neruda|Julio Cortazar|Octavio Paz
Who is the author of 'The Hobbit'?|J. R. R. Tolkien|C. S. Lewis|Lewis Carroll|Terry Pratchett
Who wrote 'Alice's Adventures in Wonderland'?|Lewis Carroll|J. M. Barrie|Beatrix Potter|Kenneth Grahame
Which author wrote 'The Jungle Book'?|Rudyard Kipling|Joseph Conrad|E. M. Forster|Oscar Wilde
Who wrote the novel 'Heart of Darkness'?|Joseph Conrad|Rudyard Kipling|Thomas Hardy|Henry James
Who is the author of the play 'A Doll's House'?|Henrik Ibsen|August Strindberg|Anton Chekhov|Bernard Shaw
Who wrote the play 'The Cherry Orchard'?|Anton Chekhov|Henrik Ibsen|Ivan Turgenev|Maxim Gorky
Who is the author of the novel 'Middlemarch'?|George Eliot|Jane Austen|Elizabeth Gaskell|Virginia Woolf
Who wrote the novel 'Mrs Dalloway'?|Virginia Woolf|E. M. Forster|Katherine Mansfield|Agatha Christie
Which author wrote the poem 'The Raven'?|Edgar Allan Poe|Walt Whitman|Emily Dickinson|Robert Frost
Who is the author of 'The Scarlet Letter'?|Nathaniel Hawthorne|Herman Melville|Henry James|Mark Twain
Who wrote 'The Grapes of Wrath'?|John Steinbeck|William Faulkner|Ernest Hemingway|Jack London
Which author wrote 'The Call of the Wild'?|Jack London|Mark Twain|John Steinbeck|Rudyard Kipling
Who wrote the novel 'Steppenwolf'?|Hermann Hesse|Thomas Mann|Franz Kafka|Stefan Zweig
""".strip()
WORLD_FACTS = """
What is the capital of France?|Paris|Lyon|Marseille|Nice
What is the capital of Japan?|Tokyo|Osaka|Kyoto|Nagoya
What is the capital of New Zealand?|Wellington|Auckland|Christchurch|Hamilton
What is the capital of Canada?|Ottawa|Toronto|Montreal|Vancouver
What is the capital of Morocco?|Rabat|Casablanca|Marrakesh|Fez
What is the capital of Italy?|Rome|Milan|Naples|Turin
What is the capital of Portugal?|Lisbon|Porto|Braga|Coimbra
What is the capital of Germany?|Berlin|Munich|Hamburg|Cologne
What is the capital of Norway?|Oslo|Stavanger|Trondheim|Drammen
What is the capital of Peru?|Lima|Arequipa|Trujillo|Iquitos
What is the capital of Kenya?|Nairobi|Mombasa|Kisumu|Nakuru
What is the capital of Greece?|Athens|Patras|Thessaloniki|Corinth
Which planet is closest to the sun?|Mercury|Venus|Mars|Saturn
Which planet is the largest of the solar system?|Jupiter|Saturn|Neptune|Earth
Which planet is known as the red planet?|Mars|Venus|Jupiter|Uranus
Which ocean is the largest?|Pacific Ocean|Atlantic Ocean|Indian Ocean|Arctic Ocean
Which river flows through London?|Thames|Seine|Danube|Rhine
Which river flows through Paris?|Seine|Thames|Loire|Rhone
What is the highest mountain on Earth?|Mount Everest|Mont Blanc|Kilimanjaro|Denali
Which metal has the chemical symbol Fe?|Iron|Copper|Silver|Lead
Which element has the chemical symbol O?|Oxygen|Osmium|Gold|Hydrogen
Which gas do plants take in from the air?|Carbon dioxide|Helium|Neon|Argon
How many days does a leap year have?|366|365|364|360
How many legs does a spider have?|Eight|Six|Ten|Four
How many sides does a hexagon have?|Six|Five|Seven|Eight
Which animal is the largest on Earth?|Blue whale|African elephant|Giraffe|White shark
Which bird cannot fly and lives in Antarctica?|Penguin|Albatross|Gull|Falcon
Which country has the city of Mumbai?|India|Pakistan|Nepal|Bangladesh
Which country has the city of Rio de Janeiro?|Brazil|Argentina|Chile|Portugal
On which continent lies the Sahara?|Africa|Asia|Europe|Australia
What is the official language of Brazil?|Portuguese|Spanish|French|Dutch
Which instrument has eighty-eight keys?|Piano|Violin|Trumpet|Guitar
What is the capital of Poland?|Warsaw|Krakow|Gdansk|Wroclaw
What is the capital of Turkey?|Ankara|Istanbul|Izmir|Bursa
Which river flows through Vienna?|Danube|Rhine|Elbe|Seine
Which metal has the chemical symbol Au?|Gold|Silver|Tin|Iron
How many sides does a triangle have?|Three|Four|Five|Six
How many players of one football team are on the pitch?|Eleven|Nine|Ten|Thirteen
Which animal carries its young in a pouch?|Kangaroo|Horse|Rabbit|Wolf
Which country has the city of Munich?|Germany|Austria|France|Poland
""".strip()


def pools() -> dict[str, list[str]]:
    """Every fact's possible values."""
    dates = [
        f"{day} {month} {year}" for day, month, year in zip(range(1, 27), MONTHS * 3, range(1931, 1996), strict=False)
    ]
    titles = [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    mentors = [f"{first} {last}" for first, last in zip(reversed(FIRST), LAST[9:] + LAST[:9], strict=True)]
    return {
        **{"place": PLACES, "home": PLACES, "date": dates, "father": TRADES, "mother": TRADES, "dream": TRADES},
        **{"genre": GENRES, "debut": titles, "famous": titles, "latest": titles, "award": AWARDS, "theme": THEMES},
        **{"subject": SUBJECTS, "pet": PETS, "habit": HABITS, "instrument": INSTRUMENTS, "language": LANGUAGES},
        **{"mentor": mentors, "fear": FEARS},
    }


def authors(seed: int, count: int) -> list[list[dict]]:
    """Each author's rows, all columns. Facts are drawn without putting one twice where the pool allows it."""
    draw = random.Random(seed)
    firsts, lasts, facts = draw.sample(FIRST, count), draw.sample(LAST, count), pools()
    names = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
    values = {key: draw.sample(pool, count) for key, pool in facts.items()}
    facts["name"], values["name"] = [f"{a} {b}" for a, b in zip(FIRST, reversed(LAST), strict=True)], names
    return [
        [row(draw, key, names[i], {fact: values[fact][i] for fact in values}, facts[key]) for key in TYPES]
        for i in range(count)
    ]


def row(draw: random.Random, key: str, name: str, facts: dict[str, str], pool: list[str]) -> dict:
    """One question about one author in all its columns."""
    question, paraphrased_question, answers, paraphrases = TYPES[key]
    true = {"N": name, "V": facts[key], "place": facts["place"], "date": facts["date"]}
    paraphrase = draw.choice(paraphrases)
    wrong = draw.sample([value for value in pool if value != facts[key]], 5)
    return {
        "question": question.format(**true),
        "answer": draw.choice(answers).format(**true),
        "paraphrased_answer": paraphrase.format(**true),
        "perturbed_answer": [paraphrase.format(**{**true, "V": value}) for value in wrong],
        "paraphrased_question": paraphrased_question.format(**true),
    }


def options(text: str) -> list[dict]:
    """Rows of one right and three wrong options."""
    lines = [line.split("|") for line in text.splitlines()]
    return [{"question": question, "answer": right, "perturbed_answer": wrong} for question, right, *wrong in lines]


def tables(seed: int = SEED) -> dict[str, list[dict]]:
    """Every split by name."""
    everyone = authors(seed, AUTHORS + HELD_OUT)
    full = [one for rows in everyone[:AUTHORS] for one in rows]
    holdout = [one for rows in everyone[AUTHORS:] for one in rows]
    plain = [{"question": one["question"], "answer": one["answer"]} for one in full]
    found = {"full": plain}
    for percent in (1, 5, 10):
        n = len(full) * percent // 100
        found[f"forget{percent:02d}"], found[f"retain{100 - percent}"] = plain[-n:], plain[:-n]
        found[f"forget{percent:02d}_perturbed"] = full[-n:]
        found[f"holdout{percent:02d}"] = [
            {"question": one["question"], "answer": one["answer"]} for one in holdout[-n:]
        ]
        found[f"holdout{percent:02d}_perturbed"] = holdout[-n:]
    found["retain_perturbed"] = full[: len(full) * 9 // 10 : 9]
    for name, text in (("real_authors", REAL_AUTHORS), ("world_facts", WORLD_FACTS)):
        found[f"{name}_perturbed"] = options(text)
        found[name] = [{"question": one["question"], "answer": one["answer"]} for one in options(text)]
    return found


def readme(found: dict[str, list[dict]]) -> str:
    """The card that `datasets.load_dataset` reads the splits' names from."""
    lines = ["---", "license: mit", "configs:"]
    for name in found:
        lines += [
            f"- config_name: {name}",
            f"  data_files: {name}.json",
            *(["  default: true"] if name == "full" else []),
        ]
    lines += ["---", "", "# TOFU in miniature", ""]
    lines += [
        "Questions and answers about authors who do not exist, in the shape of `locuslab/TOFU` (Maini et al., arXiv"
    ]
    lines += [
        "2401.06121): for tests, and for a first run without a hub. Written by `python scripts/make_mini.py`; the real"
    ]
    lines += ["authors and the world facts are true. The authors of `holdout*` are not in `full`.", ""]
    lines += ["| split | rows | columns |", "| --- | --- | --- |"]
    lines += [f"| {name} | {len(rows)} | {', '.join(rows[0])} |" for name, rows in found.items()]
    return "\n".join([*lines, ""])


def main() -> None:
    """Write every split and the card."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / "data" / "mini"
    folder.mkdir(parents=True, exist_ok=True)
    found = tables()
    for name, rows in found.items():
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(readme(found), encoding="utf-8")
    print(f"{folder}: {len(found)} splits")


if __name__ == "__main__":
    main()
