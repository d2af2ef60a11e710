"""What else classes are called, for those who search for one.

A name that lists synonyms ("tench, Tinca tinca") has them itself. For the classes of ImageNet,
whose labels are the first of their WordNet names, the others are here (WordNet 3.0, Copyright 2006
by Princeton University; https://wordnet.princeton.edu).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from var_deploy.labels import ClassNames, imagenet

_WORDNET = """
0: Tinca tinca; 1: Carassius auratus; 2: white shark, man-eater, man-eating shark, Carcharodon
carcharias; 3: Galeocerdo cuvieri; 4: hammerhead shark; 5: crampfish, numbfish, torpedo; 9:
Struthio camelus; 10: Fringilla montifringilla; 11: Carduelis carduelis; 12: linnet, Carpodacus
mexicanus; 13: snowbird; 14: indigo finch, indigo bird, Passerina cyanea; 15: American robin,
Turdus migratorius; 20: dipper; 22: American eagle, Haliaeetus leucocephalus; 24: great gray owl,
Strix nebulosa; 25: Salamandra salamandra; 26: Triturus vulgaris; 28: Ambystoma maculatum; 29: mud
puppy, Ambystoma mexicanum; 30: Rana catesbeiana; 31: tree-frog; 32: bell toad, ribbed toad, tailed
toad, Ascaphus trui; 33: loggerhead turtle, Caretta caretta; 34: leatherback, leathery turtle,
Dermochelys coriacea; 37: box tortoise; 39: iguana, Iguana iguana; 40: anole, Anolis carolinensis;
41: whiptail lizard; 43: Chlamydosaurus kingi; 45: Heloderma suspectum; 46: Lacerta viridis; 47:
Chamaeleo chamaeleon; 48: Komodo lizard, dragon lizard, giant lizard, Varanus komodoensis; 49: Nile
crocodile, Crocodylus niloticus; 50: Alligator mississipiensis; 52: worm snake, Carphophis amoenus;
53: ring-necked snake, ring snake; 54: puff adder, sand viper; 55: grass snake; 56: kingsnake; 57:
grass snake; 60: Hypsiglena torquata; 61: Constrictor constrictor; 62: rock snake, Python sebae;
63: Naja naja; 66: cerastes, sand viper, horned asp, Cerastes cornutus; 67: diamondback
rattlesnake, Crotalus adamanteus; 68: horned rattlesnake, Crotalus cerastes; 70: daddy longlegs,
Phalangium opilio; 72: Argiope aurantia; 73: Araneus cavaticus; 74: Aranea diademata; 75:
Latrodectus mactans; 77: hunting spider; 82: partridge, Bonasa umbellus; 83: prairie grouse,
prairie fowl; 87: African gray, Psittacus erithacus; 89: Kakatoe galerita, Cacatua galerita; 98:
Mergus serrator; 100: Cygnus atratus; 102: spiny anteater, anteater; 103: duckbill, duckbilled
platypus, duck-billed platypus, Ornithorhynchus anatinus; 104: brush kangaroo; 105: koala bear,
kangaroo bear, native bear, Phascolarctos cinereus; 108: anemone; 110: platyhelminth; 111: nematode
worm, roundworm; 115: nudibranch; 116: coat-of-mail shell, sea cradle, polyplacophore; 117: pearly
nautilus, nautilus; 118: Cancer magister; 119: Cancer irroratus; 121: Alaska crab, Alaskan king
crab, Alaska king crab, Paralithodes camtschatica; 122: Northern lobster, Maine lobster, Homarus
americanus; 123: langouste, rock lobster, crawfish, crayfish, sea crawfish; 124: crawfish, crawdad,
crawdaddy; 127: Ciconia ciconia; 128: Ciconia nigra; 131: Egretta caerulea; 132: great white heron,
Egretta albus; 135: Aramus pictus; 136: Porphyrio porphyrio; 137: marsh hen, mud hen, water hen,
Fulica americana; 139: Arenaria interpres; 140: dunlin, Erolia alpina; 141: Tringa totanus; 143:
oyster catcher; 145: Aptenodytes patagonica; 146: mollymawk; 147: gray whale, devilfish,
Eschrichtius gibbosus, Eschrichtius robustus; 148: killer, orca, grampus, sea wolf, Orcinus orca;
149: Dugong dugon; 153: Maltese terrier, Maltese; 154: Pekingese, Peke; 160: Afghan; 161: basset
hound; 163: sleuthhound; 166: Walker foxhound; 169: Russian wolfhound; 173: Ibizan Podenco; 174:
elkhound; 175: otter hound; 176: gazelle hound; 177: deerhound; 179: Staffordshire bull terrier;
180: Staffordshire terrier, American pit bull terrier, pit bull terrier; 190: Sealyham; 191:
Airedale terrier; 192: cairn terrier; 194: Dandie Dinmont terrier; 195: Boston terrier; 199:
Scottish terrier, Scottie; 200: chrysanthemum dog; 201: Sydney silky; 204: Lhasa apso; 211:
Hungarian pointer; 213: red setter; 216: clumber spaniel; 217: English springer spaniel; 219:
English cocker spaniel, cocker; 229: bobtail; 230: Shetland sheep dog, Shetland; 233: Bouviers des
Flandres; 235: German shepherd dog, German police dog, alsatian; 236: Doberman pinscher; 247: St
Bernard; 248: husky; 249: malemute, Alaskan malamute; 251: coach dog, carriage dog; 252: monkey
pinscher, monkey dog; 254: pug-dog; 256: Newfoundland dog; 258: Samoyede; 260: chow chow; 263:
Pembroke; 264: Cardigan; 269: grey wolf, gray wolf, Canis lupus; 270: Arctic wolf, Canis lupus
tundrarum; 271: maned wolf, Canis rufus, Canis niger; 272: prairie wolf, brush wolf, Canis latrans;
273: warrigal, warragal, Canis dingo; 274: Cuon alpinus; 275: hyena dog, Cape hunting dog, Lycaon
pictus; 276: hyaena; 277: Vulpes vulpes; 278: Vulpes macrotis; 279: white fox, Alopex lagopus; 280:
gray fox, Urocyon cinereoargenteus; 281: tabby cat; 284: Siamese; 286: puma, catamount, mountain
lion, painter, panther, Felis concolor; 287: catamount; 288: Panthera pardus; 289: ounce, Panthera
uncia; 290: panther, Panthera onca, Felis onca; 291: king of beasts, Panthera leo; 292: Panthera
tigris; 293: chetah, Acinonyx jubatus; 294: bruin, Ursus arctos; 295: black bear, Ursus americanus,
Euarctos americanus; 296: polar bear, Ursus Maritimus, Thalarctos maritimus; 297: Melursus ursinus,
Ursus ursinus; 299: mierkat; 301: ladybeetle, lady beetle, ladybird, ladybird beetle; 302: carabid
beetle; 303: longicorn, longicorn beetle; 304: chrysomelid; 310: emmet, pismire; 311: hopper; 313:
walkingstick, stick insect; 314: roach; 315: mantid; 316: cicala; 318: lacewing fly; 319: darning
needle, devil's darning needle, sewing needle, snake feeder, snake doctor, mosquito hawk, skeeter
hawk; 322: ringlet butterfly; 323: monarch butterfly, milkweed butterfly, Danaus plexippus; 325:
sulfur butterfly; 326: lycaenid butterfly; 327: sea star; 329: holothurian; 330: cottontail,
cottontail rabbit; 332: Angora rabbit; 334: hedgehog; 335: eastern fox squirrel, Sciurus niger;
338: Cavia cobaya; 341: pig, grunter, squealer, Sus scrofa; 342: boar, Sus scrofa; 344: hippo,
river horse, Hippopotamus amphibius; 346: water ox, Asiatic buffalo, Bubalus bubalis; 348: tup;
349: bighorn sheep, cimarron, Rocky Mountain bighorn, Rocky Mountain sheep, Ovis canadensis; 350:
Capra ibex; 352: Aepyceros melampus; 354: dromedary, Camelus dromedarius; 358: fitch, foulmart,
foumart, Mustela putorius; 359: ferret, Mustela nigripes; 361: polecat, wood pussy; 364: ai,
Bradypus tridactylus; 365: orang, orangutang, Pongo pygmaeus; 366: Gorilla gorilla; 367: chimp, Pan
troglodytes; 368: Hylobates lar; 369: Hylobates syndactylus, Symphalangus syndactylus; 370: guenon
monkey; 371: hussar monkey, Erythrocebus patas; 375: colobus monkey; 376: Nasalis larvatus; 378:
ringtail, Cebus capucinus; 379: howler; 380: titi monkey; 381: Ateles geoffroyi; 382: Saimiri
sciureus; 383: ring-tailed lemur, Lemur catta; 384: indris, Indri indri, Indri brevicaudatus; 385:
Elephas maximus; 386: Loxodonta africana; 387: red panda, panda, bear cat, cat bear, Ailurus
fulgens; 388: panda, panda bear, coon bear, Ailuropoda melanoleuca; 389: snoek; 391: cohoe, coho
salmon, blue jack, silver salmon, Oncorhynchus kisutch; 392: Holocanthus tricolor; 395: garfish,
garpike, billfish, Lepisosteus osseus; 397: pufferfish, blowfish, globefish; 400: academic robe,
judge's robe; 401: piano accordion, squeeze box; 403: carrier, flattop, attack aircraft carrier;
405: dirigible; 408: amphibious vehicle; 410: bee house; 412: trash can, garbage can, wastebin, ash
bin, ash-bin, ashbin, dustbin, trash barrel, trash bin; 413: assault gun; 414: back pack, knapsack,
packsack, rucksack, haversack; 415: bakeshop, bakehouse; 416: beam; 418: ballpoint pen, ballpen,
Biro; 421: banister, balustrade, balusters, handrail; 427: cask; 428: garden cart, lawn cart,
wheelbarrow; 433: swimming cap; 435: bathing tub, bath, tub; 436: station wagon, wagon, estate car,
beach waggon, station waggon, waggon; 437: lighthouse, beacon light, pharos; 439: busby, shako;
442: bell cot; 444: tandem bicycle, tandem; 445: two-piece; 446: ring-binder; 447: field glasses,
opera glasses; 450: bobsleigh, bob; 451: bolo, bola tie, bola; 452: poke bonnet; 454: bookstore,
bookstall; 457: bow-tie, bowtie; 458: memorial tablet, plaque; 459: bra, bandeau; 460: groin,
groyne, mole, bulwark, seawall, jetty; 461: aegis, egis; 463: pail; 466: bullet; 467: meat market;
468: hack, taxi, taxicab; 469: cauldron; 470: taper, wax light; 473: tin opener; 476: carrousel,
merry-go-round, roundabout, whirligig; 477: tool kit; 480: cash dispenser, automated teller
machine, automatic teller machine, automated teller, automatic teller, ATM; 486: violoncello; 487:
cellular phone, cellphone, cell, mobile phone; 490: ring mail, mail, chain armor, chain armour,
ring armor, ring armour; 491: chainsaw; 493: commode; 494: bell, gong; 495: china closet; 497:
church building; 498: movie theater, movie theatre, movie house, picture palace; 499: meat cleaver,
chopper; 502: geta, patten, sabot; 506: spiral, volute, whorl, helix; 508: keypad; 509:
confectionary, candy store; 510: containership, container vessel; 512: bottle screw; 513: horn,
trumpet, trump; 515: ten-gallon hat; 520: cot; 525: dike, dyke; 528: dial phone; 529: nappy,
napkin; 532: board; 533: dishcloth; 534: dish washer, dishwashing machine; 535: disc brake; 536:
dockage, docking facility; 537: dog sled, dog sleigh; 539: welcome mat; 540: offshore rig; 541:
membranophone, tympan; 545: blower; 552: boa; 553: file cabinet, filing cabinet; 555: fire truck;
556: fireguard; 557: flagstaff; 558: transverse flute; 566: horn; 567: frypan, skillet; 569:
dustcart; 570: respirator, gas helmet; 571: gasoline pump, petrol pump, island dispenser; 575: golf
cart; 577: tam-tam; 579: grand; 580: nursery, glasshouse; 581: radiator grille; 582: grocery, food
market, market; 589: blow dryer, blow drier, hair dryer, hair drier; 590: hand-held microcomputer;
591: hankie, hanky, hankey; 592: hard disk, fixed disk; 593: mouth organ, harp, mouth harp; 595:
reaper; 598: home theatre; 600: claw; 601: crinoline; 602: high bar; 603: horse-cart; 606:
smoothing iron; 608: blue jean, denim; 609: landrover; 610: T-shirt, tee shirt; 612: ricksha,
rickshaw; 617: laboratory coat; 619: lamp shade; 620: laptop computer; 621: mower; 622: lens cover;
623: paper knife, paperknife; 626: light, igniter, ignitor; 627: limo; 628: ocean liner; 629: lip
rouge; 632: speaker, speaker unit, loudspeaker system, speaker system; 633: jeweler's loupe; 634:
sawmill; 636: postbag; 637: letter box; 639: tank suit; 642: xylophone; 646: labyrinth; 648:
medicine cabinet; 649: megalithic structure; 650: mike; 651: microwave oven; 655: mini; 660:
manufactured home; 670: scooter; 671: all-terrain bike, off-roader; 673: computer mouse; 681:
notebook computer; 683: hautboy, hautbois; 684: sweet potato; 685: hodometer, mileometer,
milometer; 687: pipe organ; 688: scope, cathode-ray oscilloscope, CRO; 693: boat paddle; 694:
paddle wheel; 697: pyjama, pj's, jammies; 699: pandean pipe, syrinx; 701: chute; 702: bars; 705:
coach, carriage; 706: terrace; 707: pay-station; 708: plinth, footstall; 709: pencil case; 711:
essence; 714: plectrum, plectron; 716: paling; 717: pickup truck; 719: penny bank; 724: pirate
ship; 725: ewer; 726: carpenter's plane, woodworking plane; 730: plough; 731: plumber's helper;
732: Polaroid Land camera; 734: police wagon, paddy wagon, patrol wagon, wagon, black Maria; 736:
billiard table, snooker table; 737: soda bottle; 738: flowerpot; 741: prayer mat; 743: prison
house; 744: missile; 746: hockey puck; 747: punch bag, punching ball, punchball; 749: quill pen;
750: comforter, comfort, puff; 751: race car, racing car; 752: racquet; 754: wireless; 755: radio
reflector; 757: RV, R.V.; 760: icebox; 761: remote; 762: eating house, eating place, eatery; 763:
six-gun, six-shooter; 765: rocker; 767: rubber, pencil eraser; 769: ruler; 773: salt shaker; 776:
saxophone; 778: weighing machine; 782: CRT screen; 785: seatbelt; 787: buckler; 788: shoe-shop,
shoe store; 798: slipstick; 800: one-armed bandit; 803: snowplough; 807: solar collector, solar
furnace; 815: spider's web; 817: sport car; 818: spot; 826: stop watch; 829: tram, tramcar,
trolley, trolley car; 831: day bed; 832: tope; 833: pigboat, sub, U-boat; 834: suit of clothes;
837: dark glasses, shades; 838: sunblock, sun blocker; 840: swob, mop; 842: bathing trunks; 844:
electric switch, electrical switch; 847: army tank, armored combat vehicle, armoured combat
vehicle; 850: teddy bear; 851: television system; 853: thatched roof; 854: theatre curtain; 856:
thrasher, threshing machine; 860: tobacconist shop, tobacconist; 864: tow car, wrecker; 867:
tractor trailer, trucking rig, rig, articulated lorry, semi; 870: trike, velocipede; 874: trolley
coach, trackless trolley; 876: vat; 880: monocycle; 881: upright piano; 882: vacuum cleaner; 889:
fiddle; 893: billfold, notecase, pocketbook; 894: closet, press; 895: military plane; 896:
handbasin, washbowl, lavabo, wash-hand basin; 897: automatic washer, washing machine; 911: woolen,
woollen; 912: snake fence, snake-rail fence, Virginia fence; 916: website, internet site, site;
918: crossword; 920: traffic signal, stoplight; 921: dust cover, dust jacket, dust wrapper; 926:
hotpot; 928: icecream; 929: lolly, lollipop, popsicle; 931: beigel; 934: hot dog, red hot; 939:
courgette; 943: cuke; 944: globe artichoke; 953: ananas; 955: jak, jack; 960: chocolate syrup; 962:
meatloaf; 963: pizza pie; 972: drop, drop-off; 975: lakeshore; 976: headland, head, foreland; 977:
sand bar; 978: coast, seacoast, sea-coast; 979: vale; 981: baseball player; 982: bridegroom; 986:
yellow lady-slipper, Cypripedium calceolus, Cypripedium parviflorum; 989: rose hip, rosehip; 990:
horse chestnut, conker; 994: carrion fungus; 996: hen of the woods, Polyporus frondosus, Grifola
frondosa; 998: spike, capitulum; 999: toilet paper, bathroom tissue
"""


def class_synonyms(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The other names of each class, in the order of `names`; empty where there are none."""
    wordnet = _wordnet() if tuple(names) == imagenet.CLASS_NAMES else {}
    return [
        (*(part.strip() for part in name.split(",")[1:] if part.strip()), *wordnet.get(n, ()))
        for n, name in enumerate(names)
    ]


def all_classes(names: Sequence[str], classes: int) -> list[ClassNames]:
    """Every class of a model, in the order of the labels; `names` is empty where there are none."""
    if not names:
        return [ClassNames(number=n, name="") for n in range(classes)]
    return [
        ClassNames(number=n, name=name, synonyms=others)
        for n, (name, others) in enumerate(zip(names, class_synonyms(names), strict=True))
    ]


@functools.lru_cache(maxsize=1)
def _wordnet() -> dict[int, tuple[str, ...]]:
    """Names by the number of the class."""
    entries = (entry.split(":") for entry in _WORDNET.split(";"))
    return {
        int(number): tuple(" ".join(name.split()) for name in others.split(","))
        for number, others in entries
    }
